"""A record on a page and on a terminal: what is shown is what the processor made, and nothing of it acts."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small_run import LLM, STACKED, TOKENIZER, VISION

from deepstack_pl.batch import IGNORE_INDEX, Record, Refused, Role, Turn
from deepstack_pl.inspection.anatomy import Anatomy, dissect
from deepstack_pl.inspection.sample_page import refusal_page, sample_page
from deepstack_pl.inspection.sample_text import MOST_PIECES, print_refusal, print_sample
from deepstack_pl.inspection.sample_words import Stored, safe, token_text
from deepstack_pl.language.config import TooLong
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Dealing, Host, InjectionConfig, ModelConfig, Newline, Order, Sequence, Source

HD = ModelConfig(
    name="hd",
    detail=2,
    sequence=Sequence.global_and_tiles,
    order=Order.raster,
    newline=Newline.rows_and_groups,
    source=Source.detail,
)
PLANS = {
    "l": STACKED,
    "hd": HD,
    "lv": ModelConfig(name="lv", injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(3)]),
    "baseline": ModelConfig(name="baseline", tiles=0, groups=0),
    "blank": ModelConfig(name="blank", sequence=Sequence.blank),
    "channels": ModelConfig(name="channels", sequence=Sequence.channels, groups=0),
    "again": ModelConfig(name="again", source=Source.global_view, groups=2),
    "taps": ModelConfig(name="taps", source=Source.tap, taps=[1, 2], groups=2),
    "pooled": ModelConfig(name="pooled", pooling=2, dealing=Dealing.tiles),
    "string": ModelConfig(name="string", sequence=Sequence.tiles, groups=0),
}
EVIL = "\x1b[31mred \x00 \u202egnp.exe\u202c \ud800 <script>alert(1)</script> &amp; \x9b2J \u2028 [bold]x[/bold]"


def processor_of(plan: ModelConfig, length: int = 4096, too_long: TooLong = TooLong.cut_text) -> DeepStackProcessor:
    built = build_plan(plan, LLM, VISION)
    return DeepStackProcessor(
        TOKENIZER, plan=built, vision=VISION, template="shipped", max_length=length, too_long=too_long
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record_of(*images: Image.Image, question: str = "Which?", answer: str = "teal gold") -> Record:
    turns = (Turn(Role.user, "<image>" * len(images) + question), Turn(Role.assistant, answer))
    return Record(key="train/shard-000000.tar:000000012", turns=turns, images=images, source="coco")


def terminal_of(anatomy: Anatomy, stored: Stored | None = None, *, colours: bool = False) -> str:
    system = "truecolor" if colours else None
    console = Console(file=io.StringIO(), width=100, force_terminal=colours, color_system=system)
    print_sample(console, anatomy, stored or Stored(), "record 12")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Found(HTMLParser):
    """The page's tokens, each as its classes and the texts in it, its elements and its addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set[str], list[str]]] = []
        self.elements: set[str] = set()
        self.addresses: list[str] = []
        self._depth = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.add(tag)
        self.addresses += [value for name, value in values.items() if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name in values)
        classes = set(values.get("class", "").split())
        if "token" in classes:
            self.tokens.append((classes, []))
            self._depth = 1
        elif self._depth and tag not in ("br", "img", "meta"):
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        self._depth = max(0, self._depth - 1)

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.tokens[-1][1].append(data)


def flow(page: str) -> list[tuple[set[str], list[str]]]:
    """The tokens of the sample, without the legend's."""
    return [token for token in Found(page).tokens if len(token[1]) > 1]


@pytest.mark.parametrize("name", PLANS)
def test_every_position_of_the_sample_is_shown_with_its_id_and_its_unshifted_label(name):
    processor, record = processor_of(PLANS[name]), record_of(noise(40, 60))
    sample, anatomy = processor.prepare(record), dissect(processor, record)
    ids, labels, at = sample.input_ids.tolist(), sample.labels.tolist(), 0
    for classes, texts in flow(sample_page(anatomy, Stored(), "")):
        if "image" in classes:
            count = int(texts[0].rsplit(" x ", 1)[1].replace(",", ""))
            assert ids[at : at + count] == [processor.image_token_id] * count
            at += count
            continue
        assert texts[1] == f"{at} · {ids[at]}"
        assert ("learned" in classes) == (labels[at] != IGNORE_INDEX)
        assert texts[2:] == ([f"label = {labels[at]} ← {at - 1}"] if labels[at] != IGNORE_INDEX else [])
        at += 1
    assert at == len(ids)
    assert (anatomy.positions, anatomy.visual) == (len(ids), int((sample.token_index >= 0).sum()))
    assert anatomy.learned == int((sample.labels[1:] != IGNORE_INDEX).sum())


def test_boards_are_the_image_as_it_was_cut_and_of_the_right_image():
    first, second = noise(64, 64, 1), noise(20, 90, 2)
    pictures = dissect(processor_of(HD), record_of(first, second)).pictures
    for image, picture, (columns, rows) in zip((first, second), pictures, ((2, 2), (1, 4)), strict=True):
        sides = ((1, 1), (columns, rows), (2, 2), (2 * columns, 2 * rows))
        for board, (across, down) in zip(picture.boards, sides, strict=True):
            whole = image.resize((16 * across, 16 * down), Image.Resampling.BICUBIC)
            assert board.grid == (across, down)
            np.testing.assert_array_equal(board.pixels, np.asarray(whole))


@pytest.mark.parametrize("dealing", [Dealing.strided_2d, Dealing.strided_1d, Dealing.tiles])
def test_groups_lie_on_the_mosaic_as_they_are_dealt(dealing):
    plan = ModelConfig(name="l", dealing=dealing)
    mosaic = dissect(processor_of(plan), record_of(noise(64, 64))).pictures[0].boards[1]
    y, x = np.mgrid[0:8, 0:8]
    expected = {
        Dealing.strided_2d: y % 2 * 2 + x % 2,
        Dealing.strided_1d: (y * 8 + x) % 4,
        Dealing.tiles: y // 4 * 2 + x // 4,
    }[dealing]
    assert [group for _, group in mosaic.groups] == [0, 1, 2, 3]
    for (_, group), mask in mosaic.groups.items():
        np.testing.assert_array_equal(mask, expected == group)


def test_a_group_says_where_it_enters_and_that_a_small_grid_does_not_fill_it():
    wide = dissect(processor_of(PLANS["lv"]), record_of(noise(48, 16))).pictures[0]
    page = sample_page(dissect(processor_of(PLANS["lv"]), record_of(noise(48, 16))), Stored(), "")
    assert [group.tokens for group in wide.groups] == [16, 16, 16, 0]
    assert "group 0 -&gt; vit layer 0, llm layer 1: 16 tokens" in page
    assert "group 3: this image does not fill it, nothing is added (llm layer 4)" in page


def test_details_of_every_view_count_for_their_group():
    anatomy = dissect(processor_of(HD), record_of(noise(64, 64)))
    assert "detail group 0 -> llm layer 1: 80 tokens and 8 newlines" in terminal_of(anatomy)
    assert "88 positions in the text (16 global view + 64 tiles + 8 newlines)" in terminal_of(anatomy)


@pytest.mark.parametrize("name", PLANS)
def test_page_and_terminal_show_any_plan_with_several_images(name):
    anatomy = dissect(processor_of(PLANS[name]), record_of(noise(64, 64), noise(90, 20)))
    shown = terminal_of(anatomy)
    assert "image 0" in shown
    assert "image 1" in shown
    assert sample_page(anatomy, Stored(), "").count("data:image/png;base64") >= 5


def test_cut_text_is_marked_and_counted():
    record = record_of(noise(64, 64), answer="teal " * 100)
    whole = len(processor_of(STACKED).prepare(record).input_ids)
    anatomy = dissect(processor_of(STACKED, length=40), record)
    kept = processor_of(STACKED, length=40).prepare(record).labels[1:] != IGNORE_INDEX
    assert anatomy.learned == int(kept.sum())
    assert (anatomy.positions, anatomy.cut, anatomy.cut_learned) == (40, whole - 40, whole - 40)
    tokens = flow(sample_page(anatomy, Stored(), ""))
    assert sum("cut" in classes for classes, _ in tokens) == whole - 40
    assert all(len(texts) == 2 and "learned" not in classes for classes, texts in tokens if "cut" in classes)
    shown = terminal_of(anatomy)
    assert f"CUT OFF from here: {whole - 40} positions, {whole - 40} of them answers" in shown
    assert "\ncut | " in shown
    assert "x" in shown[shown.index("tokens\n[") :].splitlines()[1]


def test_an_image_that_is_cut_with_the_text_is_shown_as_left_out():
    turns = (
        Turn(Role.user, "<image>Which?"),
        Turn(Role.assistant, "teal"),
        Turn(Role.user, "<image>And?"),
        Turn(Role.assistant, "gold"),
    )
    record = Record(key="k", turns=turns, images=(noise(64, 64, 1), noise(64, 64, 2)))
    left_out = dissect(processor_of(STACKED, length=36), record)
    assert (left_out.cut_of(0), left_out.cut_of(1)) == (0, 16)
    assert "CUT OFF: all of them" in terminal_of(left_out)
    assert "16 positions of this image are cut off." in sample_page(left_out, Stored(), "")
    in_two = dissect(processor_of(STACKED, length=36, too_long=TooLong.cut), record)
    assert 0 < in_two.cut_of(1) < 16


def test_what_is_not_trained_on_is_refused_and_its_record_is_shown_as_it_is_stored():
    with pytest.raises(Refused):
        dissect(processor_of(STACKED, length=10), record_of(noise(64, 64)))
    page = refusal_page("k", f"k: {EVIL}", Stored('{"id": "<b>7"}'), "record 7")
    assert "&quot;id&quot;: &quot;&lt;b&gt;7&quot;" in page
    assert "script" not in Found(page).elements
    console = Console(file=io.StringIO(), width=200)
    print_refusal(console, "k", f"k: {EVIL}", Stored('{"id": "<b>7"}'), "record 7")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert '{"id": "<b>7"}' in shown
    assert "REFUSED  k: <U+001B>[31mred" in shown


def test_nothing_in_a_record_acts_on_the_page_or_the_terminal():
    said = EVIL.replace("\ud800", "")  # no tokenizer takes half a character
    turns = (Turn(Role.user, f"<image>{said}"), Turn(Role.assistant, said))
    record = Record(key=f"train/{EVIL}:1", turns=turns, images=(noise(64, 64),), source=EVIL)
    anatomy, stored = dissect(processor_of(STACKED), record), Stored(EVIL, (EVIL,))
    page = sample_page(anatomy, stored, EVIL, [EVIL])
    page.encode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ud800-\udfff]", page)
    assert "script" not in Found(page).elements
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal_of(anatomy, stored, colours=True))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ud800-\udfff]", shown)
    assert "<U+001B>[31mred" in shown
    assert "[bold]x[/bold]" in shown


def test_the_page_needs_nothing_from_elsewhere():
    page = sample_page(dissect(processor_of(HD), record_of(noise(64, 64))), Stored("{}"), "")
    found = Found(page)
    assert found.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in found.addresses)
    assert not {"script", "link", "iframe", "object"} & found.elements
    assert "default-src 'none'" in page


def test_a_text_only_record_says_that_it_has_no_image():
    anatomy = dissect(processor_of(STACKED), record_of())
    assert "no image: the sample is text alone" in terminal_of(anatomy)
    assert "None: the sample is text alone." in sample_page(anatomy, Stored(), "")
    assert anatomy.visual == 0


def test_a_long_sample_says_how_many_tokens_the_terminal_leaves_to_the_page():
    anatomy = dissect(processor_of(STACKED), record_of(noise(64, 64), answer="teal " * 900))
    rest = len(anatomy.pieces) - MOST_PIECES
    assert rest > 0
    assert f"... {rest:,} more; the page has all ..." in terminal_of(anatomy)
    assert len(flow(sample_page(anatomy, Stored(), ""))) == len(anatomy.pieces)


def test_learned_and_cut_are_told_by_more_than_their_colour():
    anatomy = dissect(processor_of(STACKED, length=40), record_of(noise(64, 64), answer="teal " * 100))
    page = sample_page(anatomy, Stored(), "")
    assert re.search(r"\.learned b \{[^}]*underline", page)
    assert re.search(r"\.cut b \{[^}]*line-through", page)
    line = terminal_of(anatomy).split("\ntokens\n")[1].splitlines()[0]
    assert {"·", "=", "#", "x"} <= set(line)


def test_the_bar_of_positions_loses_nothing_small():
    anatomy = dissect(processor_of(STACKED), record_of(noise(64, 64), question="word " * 900, answer="a"))
    line = terminal_of(anatomy).split("\ntokens\n")[1].splitlines()[0]
    assert {"·", "=", "#"} <= set(line)


def test_text_is_made_visible_and_otherwise_left_alone():
    assert safe("héllo 漢字 😀\n") == "héllo 漢字 😀<U+000A>"
    assert safe("a\n\tb", lines=True) == "a\n    b"
    assert safe("\x1b\u200b\ud800") == "<U+001B><U+200B><U+D800>"
    assert token_text(" a\n") == "␣a↵"
    assert token_text("\u0301") == "◌\u0301"
