"""What a record becomes, as values: tokens with their part in training, images with their views, and counts.

`sample_page` and `sample_text` show them. All of it is read off the processor's own `Sample`; nothing is dealt or cut
a second time. What is cut off is known from the same record, prepared once more with no limit of length.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from deepstack_pl.batch import IGNORE_INDEX, Record, Sample
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import OPERATORS, Dealt, Encoding, Host, Resize
from deepstack_pl.stacking.config import Sequence as InText
from deepstack_pl.stacking.injection import NEWLINE, NOTHING
from deepstack_pl.stacking.mosaic import best_grid, image_tables
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.stacking.rules import ALIGNED


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the positions of one image that are all kept or all cut off.

    Attributes:
        position: the first one's place in the sample, from 0.
        label: unshifted; the model's prediction at ``position - 1`` is compared with it. -100: nothing is.
        text: as the token writes it, not yet safe to print.
        image: which image's, None at text.
        cut: it is not in the sample.
    """

    position: int
    count: int
    id: int
    label: int
    text: str
    image: int | None
    special: bool
    cut: bool

    @property
    def learned(self) -> bool:
        return self.label != IGNORE_INDEX and not self.cut

    @property
    def kind(self) -> str:
        """``cut``, ``image``, ``learned`` or ``given``."""
        return "cut" if self.cut else "image" if self.image is not None else "learned" if self.learned else "given"


@dataclass(frozen=True, slots=True)
class Board:
    """Views of one image laid side by side, as they were cut from it.

    Attributes:
        pixels: of the whole board.
        grid: columns and rows of views; ``block``: views a side that belong to one tile.
        groups: for each group that takes tokens from it, which ones: a mask over the board's tokens.
    """

    name: str
    pixels: UInt8[NDArray, "h w 3"]
    grid: tuple[int, int]
    block: int
    groups: dict[Dealt, Bool[NDArray, "y x"]]


@dataclass(frozen=True, slots=True)
class Group:
    """A group as one image fills it: how many tokens and newlines it adds, and where it enters."""

    dealt: Dealt
    name: str
    tokens: int
    newlines: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image: its boards, its groups, and what of it stands in the text (name and number of positions)."""

    size: tuple[int, int]
    boards: tuple[Board, ...]
    groups: tuple[Group, ...]
    in_text: tuple[tuple[str, int], ...]

    @property
    def positions(self) -> int:
        return sum(count for _, count in self.in_text)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All of one sample. Counts are of what is kept, but for ``cut`` and ``cut_learned``."""

    record: Record
    plan: Plan
    template: str
    max_length: int
    tokens_per_view: int
    pieces: tuple[Piece, ...]
    pictures: tuple[Picture, ...]
    positions: int
    visual: int
    learned: int
    cut: int
    cut_learned: int

    @property
    def share(self) -> float:
        """How much of ``llm.max_length`` it fills."""
        return self.positions / self.max_length

    def cut_of(self, image: int) -> int:
        """How many positions of that image are cut off."""
        return sum(piece.count for piece in self.pieces if piece.cut and piece.image == image)


def dissect(processor: DeepStackProcessor, record: Record) -> Anatomy:
    """``record`` as training sees it.

    Raises:
        Refused: it is not trained on.
    """
    sample = processor.prepare(record)
    unlimited = copy.copy(processor)
    unlimited.max_length = sys.maxsize
    whole = unlimited.prepare(record) if sample.cut else sample
    kept = len(sample.input_ids)
    assert torch.equal(whole.input_ids[:kept], sample.input_ids)
    assert torch.equal(whole.labels[:kept], sample.labels)
    pictures = _pictures(processor, record, whole)
    learned = whole.labels[1:] != IGNORE_INDEX  # no prediction is compared with the first
    return Anatomy(
        record=record,
        plan=processor.plan,
        template=processor.template.name,
        max_length=processor.max_length,
        tokens_per_view=processor.tokens_per_view,
        pieces=tuple(_pieces(processor, whole, kept, [picture.positions for picture in pictures])),
        pictures=tuple(pictures),
        positions=kept,
        visual=int((sample.token_index >= 0).sum()),
        learned=int(learned[: kept - 1].sum()),
        cut=sample.cut,
        cut_learned=int(learned[kept - 1 :].sum()),
    )


def enters(plan: Plan, dealt: Dealt) -> tuple[str, ...]:
    """The places that a group enters: ``llm layer 3``, ``vit block 0, gated``."""
    places = [f"{i.host.value} layer {i.layer}{OPERATORS[i.operator]}" for i in plan.injections if i.dealt == dealt]
    if plan.sequence is InText.channels and dealt in plan.groups(Host.llm):
        places.append("beside the global view's token, in its channels")
    return tuple(places)


def how_dealt(plan: Plan) -> str:
    """How mosaics and details become groups, for captions."""
    if not plan.tiles and plan.detail == 1:
        return "not cut"
    says = f"dealt {plan.dealing.value}"
    says += ", letter-boxed" if plan.resize is Resize.letterbox else ""
    return says + (", read in one pass" if plan.encoding is Encoding.one_pass else "")


def _pieces(processor: DeepStackProcessor, whole: Sample, kept: int, slots: Sequence[int]) -> list[Piece]:
    ids, labels = whole.input_ids.tolist(), whole.labels.tolist()
    special, texts = set(processor.tokenizer.all_special_ids), _texts(processor, set(ids))
    ends = np.cumsum([0, *slots])
    pieces: list[Piece] = []
    for place, (token, label, slot) in enumerate(zip(ids, labels, whole.token_index.tolist(), strict=True)):
        image = None if slot < 0 else int(np.searchsorted(ends, slot, side="right")) - 1
        cut, last = place >= kept, pieces[-1] if pieces else None
        if last is not None and image is not None and (last.image, last.cut) == (image, cut):
            pieces[-1] = Piece(last.position, last.count + 1, token, label, last.text, image, True, cut)
        else:
            pieces.append(Piece(place, 1, token, label, texts[token], image, token in special, cut))
    return pieces


def _texts(processor: DeepStackProcessor, ids: set[int]) -> dict[int, str]:
    """What each token writes after another one; a part of a character, or nothing, as the vocabulary spells it."""
    texts = {}
    for token in ids:
        once, twice = (processor.tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        assert isinstance(once, str)
        assert isinstance(twice, str)
        text = twice.removeprefix(once) if twice.startswith(once) else ""
        if not text or "\ufffd" in text:
            spelling = processor.tokenizer.convert_ids_to_tokens(token)
            text = spelling if isinstance(spelling, str) else f"[{token}]"
        texts[token] = text
    return texts


def _pictures(processor: DeepStackProcessor, record: Record, whole: Sample) -> list[Picture]:
    plan, vision = processor.plan, processor.vision
    patches, per_view = vision.patches_per_side, processor.tokens_per_view
    grids = [
        best_grid(*image.size, tile=vision.image_size, tiles=plan.tiles, rule=plan.grid) if plan.tiles else None
        for image in record.images
    ]
    counts = [plan.views(grid[0] * grid[1] if grid else 0) for grid in grids]
    slots = [len(image_tables(plan, grid, patches).sequence) for grid in grids]
    assert sum(counts) == len(whole.views)
    assert sum(slots) == len(whole.sequence_rows)
    pixels = rearrange(whole.views, "v c y x -> v y x c").numpy()
    pictures, other, slot = [], whole.images, 0
    for number, (image, grid, count, taken) in enumerate(zip(record.images, grids, counts, slots, strict=True)):
        views = [number, *range(other, other + count - 1)]  # of the sample, in the image's own order
        rows = {d: r[slot : slot + taken] for d, r in zip(plan.groups(Host.llm), whole.group_rows, strict=True)}
        at = slice(number * patches**2, (number + 1) * patches**2)
        in_tower = {d: r[at] for d, r in zip(plan.groups(Host.vit), whole.vit_rows, strict=True)}
        masks = {dealt: _mask(r, views, patches**2) for dealt, r in in_tower.items()}
        cut = {dealt: r for dealt, r in rows.items() if dealt[0] not in ALIGNED}  # those lie under every token
        masks |= {dealt: _mask(r, views, per_view) for dealt, r in cut.items()}
        pictures.append(
            Picture(
                size=image.size,
                boards=tuple(_boards(plan, grid, pixels[views], masks)),
                groups=tuple(_group(plan, dealt, r) for dealt, r in (in_tower | rows).items()),
                in_text=_in_text(plan, whole.sequence_rows[slot : slot + taken], number, per_view),
            )
        )
        other, slot = other + count - 1, slot + taken
    return pictures


def _mask(rows: Int[Tensor, " n"], views: list[int], per_view: int) -> Bool[NDArray, "v side side"]:
    """Which tokens of which of the image's views ``rows`` name."""
    side = isqrt(per_view)
    mask = np.zeros((len(views), per_view), dtype=bool)
    own = {view: place for place, view in enumerate(views)}
    for row in rows[rows >= 0].tolist():
        mask[own[row // per_view], row % per_view] = True
    return mask.reshape(len(views), side, side)


def _boards(
    plan: Plan, grid: tuple[int, int] | None, pixels: UInt8[NDArray, "v s s 3"], masks: dict[Dealt, NDArray]
) -> list[Board]:
    columns, rows = grid or (0, 0)
    tiles, detail = columns * rows, plan.detail
    mosaic = np.arange(1, 1 + tiles).reshape(rows, columns)
    laid = [("global view", np.array([[0]]), 1)] + ([("mosaic of tiles", mosaic, 1)] if tiles else [])
    if detail > 1:
        own = np.arange(detail**2).reshape(detail, detail)
        laid.append(("details of the global view", 1 + tiles + own, detail))
        if tiles:
            first = 1 + tiles + np.kron(mosaic, np.full_like(own, detail**2))
            laid.append(("details of the mosaic", first + np.tile(own, (rows, columns)), detail))
    boards = []
    for name, views, block in laid:
        groups = {dealt: _lay(mask[views.ravel()], views.shape[1]) for dealt, mask in masks.items()}
        groups = {dealt: mask for dealt, mask in groups.items() if mask.any()}
        boards.append(Board(name, _lay(pixels[views.ravel()], views.shape[1]), views.shape[::-1], block, groups))
    return boards


def _lay(views: NDArray, columns: int) -> NDArray:
    return rearrange(views, "(r c) h w ... -> (r h) (c w) ...", c=columns)


def _group(plan: Plan, dealt: Dealt, rows: Int[Tensor, " n"]) -> Group:
    name = next((i.what for i in plan.injections if i.dealt == dealt), f"group {dealt[1]}")
    return Group(dealt, name, int((rows >= 0).sum()), int((rows == NEWLINE).sum()), enters(plan, dealt))


def _in_text(plan: Plan, rows: Int[Tensor, " n"], image: int, per_view: int) -> tuple[tuple[str, int], ...]:
    """What stands at the image's positions; ``image``'s global view is the sample's view of that number."""
    own = (rows >= 0) & (rows // per_view == image)
    blanks = "blank" if plan.sequence is InText.blank else "zeros of unfilled groups"
    found = {"global view": own, "tiles": (rows >= 0) & ~own, "newlines": rows == NEWLINE, blanks: rows == NOTHING}
    return tuple((name, int(which.sum())) for name, which in found.items() if which.any())
