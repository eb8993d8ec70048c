"""LLaVA's format, taken strictly: a record becomes turns, or a refusal that names it."""

import io

import pytest
from PIL import Image

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data.llava import check_turns, record_from_llava, source_of

RED = Image.new("RGB", (4, 4), "red")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def said(*turns: str, **more: object) -> dict:
    """A record whose turns alternate, the user first."""
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "x", "conversations": conversation, **more}


def test_a_record_keeps_turns_images_kind_and_facts() -> None:
    values = said("<image>\nWhat?", "a b", kind="fine", facts=["a", "b"])
    record = record_from_llava(values, [RED], "k")
    assert record.turns == (Turn(Role.user, "<image>\nWhat?"), Turn(Role.assistant, "a b"))
    assert (record.key, record.kind, record.facts, record.images) == ("k", "fine", ("a", "b"), (RED,))


def test_without_facts_the_last_answer_is_the_fact() -> None:
    record = record_from_llava(said("Hello", "Hi", "And?", "Well."), [], "k")
    assert (record.kind, record.facts) == ("answer", ("Well.",))


def test_a_leading_answer_is_dropped() -> None:
    values = said("Hello", "Hi")
    values["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    assert [turn.text for turn in record_from_llava(values, [], "k").turns] == ["Hello", "Hi"]


def test_one_image_asked_for_twice_in_a_turn_is_shown_once_and_first() -> None:
    record = record_from_llava(said("Which <image>\nis\n<image>", "a"), [RED], "k")
    assert record.turns[0].text == "<image>\nWhich \nis"
    several = record_from_llava(said("One <image> two <image>", "a"), [RED, RED], "k")
    assert several.turns[0].text == "One <image> two <image>"


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("coco/train2017/000000033471.jpg", "coco"),
        (["vg/VG_100K/1.jpg", "coco/2.jpg"], "vg"),
        ("00453/004539375.jpg", ""),
        ("cat.jpg", ""),
        (None, "text"),
        ([], "text"),
        ("/etc/passwd", ""),
        ("../x.jpg", ""),
        (7, ""),
        ("a\nb/c.jpg", ""),
    ],
)
def test_source_is_the_first_folder_of_the_image_unless_a_number(image: object, source: str) -> None:
    assert source_of({"image": image}) == source


@pytest.mark.parametrize(
    ("values", "images", "message"),
    [
        (said("<image>", "a", "<image>", "b"), 1, r"^k: 2 <image> placeholders in the text, but 1 images\. Write one"),
        (said("<image><image><image>", "a"), 2, "3 <image> placeholders in the text, but 2 images"),
        (said("Half \ud83d", "a"), 0, r"turn 0 holds half a character, '\\ud83d', at 5"),
        (said("What?", "a"), 1, "0 <image> placeholders in the text, but 1 images"),
        (said("What is <image>?", "a"), 0, "1 <image> placeholders in the text, but 0 images"),
        (said(), 0, "an empty conversation"),
        (said("What?"), 0, "last answer is missing"),
        (said("What?", "a", "And <image>?"), 1, "last answer is missing"),
        (said("What?", "  "), 0, "last answer is missing"),
        (
            said("What?", "<image> a"),
            1,
            r"^k: turn 1, an answer, holds <image>: .*Move the placeholder to the question",
        ),
        (said("<image>", "a", "And?", "<image>"), 1, "^k: turn 3, an answer, holds <image>"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, 0, "an empty conversation"),
        ({"conversations": said("a")["conversations"] * 2}, 0, "two turns in a row"),
        ({"conversations": [{"from": "system", "value": "a"}]}, 0, "turn 0 is from 'system'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, 0, "turn 0 is from \\['human'\\]"),
        ({"conversations": [{"from": "human", "value": 3}]}, 0, "turn 0 has no text"),
        ({"text": "a"}, 0, "no list of"),
        ([], 0, "no list of"),
        (said("What?", "a", facts="a"), 0, "a list of strings"),
    ],
)
def test_a_malformed_record_is_refused_by_key(values: dict, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from_llava(values, [RED] * images, "k")


@pytest.mark.parametrize(
    "text", ["", " ", "שלום مرحبا \u202e", "👩\u200d🚀", "\x00\ufeff", "<|end|></s><eos>", "n " * 100_000]
)
def test_a_turn_is_kept_to_the_letter(text: str) -> None:
    record = record_from_llava(said(text, f"{text}."), [], "k")
    assert [turn.text for turn in record.turns] == [text, f"{text}."]


def test_a_last_question_that_nothing_answers_is_dropped() -> None:
    assert check_turns(said("What?", "a", "And?"), 0, "k") == check_turns(said("What?", "a"), 0, "k")


def test_a_folder_called_text_is_not_the_source_of_text_alone() -> None:
    assert source_of({"image": "text/1.jpg"}) == ""
