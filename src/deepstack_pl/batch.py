"""The shared nouns: one sample, one batch, and how samples become a batch.

Axes: ``b`` samples, ``t`` positions, ``v`` views, ``n`` slots (positions that images take, over the whole batch),
``g`` groups entering the LLM, ``h`` groups entering the vision tower, ``m`` patches of all global views.
A *row* is ``view * tokens_per_view + patch``; global views come first, then all others (tiles, details). Below zero it
is none: -1 stands for nothing, -2 for the learned newline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100


class PadSide(Enum):
    """Where short samples are filled up: right in training, left in generation."""

    right = "right"
    left = "left"


class Role(Enum):
    """Who speaks."""

    user = "user"
    assistant = "assistant"


class Reason(Enum):
    """Why a sample is not trained on."""

    missing = "missing"  # an image is not there
    image = "image"  # an image cannot be read
    conversation = "conversation"  # its turns cannot be learned from
    too_long = "too_long"  # nothing to learn is left within llm.max_length
    changed = "changed"  # its bytes are not those of the index


class Refused(ValueError):
    """A sample that cannot be trained on; the sentence names it, the rule and the remedy."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(reason, sentence)  # both, so that it travels between processes
        self.reason = reason
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance; ``<image>`` in it stands for the next image, unless it is ``plain``: what a model wrote."""

    role: Role
    text: str
    plain: bool = False


@dataclass(kw_only=True, slots=True)
class Record:
    """One conversation as read from a source, decoded.

    Attributes:
        key: names it in messages: shard and key, or file and row.
        source: the part of the corpus it belongs to, for counts and losses by source: ``coco``, ``text``, ...
        kind: what it asks for (``coarse``, ``fine``, ...); metrics are reported by kind.
        facts: the parts of its last answer that are scored one by one; the whole answer where nothing finer is known.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    kind: str = "answer"
    facts: tuple[str, ...] = ()
    source: str = ""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One conversation, expanded: every image placeholder is already as many positions as its image takes.

    Attributes:
        key: where it came from, for messages.
        labels: unshifted; -100 where nothing is learned.
        views: the sample's global views, in order, then its other views, image by image; levels 0 to 255.
        images: how many global views.
        token_index: for each position its slot, -1 at text.
        sequence_rows: for each slot the row that stands in the text sequence.
        group_rows: for each group and slot the row added in the LLM.
        vit_rows: for each group and patch of the global views the row added in the tower, where a view has as many
            tokens as patches; in the LLM it has fewer if the plan pools.
        cut: positions that were cut off because the sample was too long.
        source: as in `Record`.
        refused: why there is nothing of it here, as (reason, sentence); None for a sample that is trained on.
    """

    key: str
    input_ids: Int[Tensor, " t"]
    labels: Int[Tensor, " t"]
    views: UInt8[Tensor, "v 3 s s"]
    images: int
    token_index: Int[Tensor, " t"]
    sequence_rows: Int[Tensor, " n"]
    group_rows: Int[Tensor, "g n"]
    vit_rows: Int[Tensor, "h m"]
    cut: int = 0
    source: str = ""
    refused: tuple[Reason, str] | None = None


@dataclass(kw_only=True, slots=True)
class MultimodalBatch:
    """What the model reads; the fields are its ``forward``'s keywords, but for those below.

    Attributes:
        keys: of its samples, row by row; "" for one that only fills the batch. A row is one sample, or several that are
            packed into it as segments.
        sources: of its samples.
        cuts: positions that were cut off each sample.
        refused: for each sample why there is nothing of it, None where it is trained on.
        lengths: positions of each sample.
        segment_ids: for each position the number of its sample in the row, from 1; 0 at padding.
        boundaries: where segments begin, row after row, and where the last one ends; a row's padding is one, too.
        longest: positions of the longest segment.
        learned_at: positions, row after row, whose next token is learned; where none is, the last one.
        targets: what is learned there; -100 where nothing is.
        filled: for each group of ``group_rows`` and ``vit_rows`` how many of its entries are something.
    """

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    views: UInt8[Tensor, "v 3 s s"]
    token_index: Int[Tensor, "b t"]
    sequence_rows: Int[Tensor, " n"]
    group_rows: Int[Tensor, "g n"]
    vit_rows: Int[Tensor, "h m"]
    keys: list[str]
    sources: list[str]
    cuts: list[int]
    refused: list[tuple[Reason, str] | None]
    lengths: list[int]
    segment_ids: Int[Tensor, "b t"]
    boundaries: Int[Tensor, " ends"]
    longest: int
    learned_at: Int[Tensor, " l"]
    targets: Int[Tensor, " l"]
    filled: dict[str, list[int]]

    def to(self, device: torch.device | str) -> "MultimodalBatch":
        """The same batch on ``device``."""
        # From pinned memory to a GPU the copy is queued before all that reads it; the other way nothing waits for it.
        queued = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=queued))

    def pin_memory(self) -> "MultimodalBatch":
        """The same batch in page-locked memory; DataLoaders call this, and would leave out what has no such method."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MultimodalBatch":
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if f.name not in _HOST})

    @property
    def packed(self) -> bool:
        """Whether some row holds several samples, which must not see each other."""
        return len(self.keys) > len(self.input_ids)

    def sample_ids(self) -> Int[Tensor, "b t"]:
        """For each position its sample, as a place in ``keys``; -1 at padding."""
        in_row = self.segment_ids.max(1).values
        before = in_row.cumsum(0) - in_row
        return torch.where(self.segment_ids > 0, self.segment_ids - 1 + before[:, None], -1)

    def model_inputs(self) -> dict[str, Tensor]:
        """What a forward pass reads that gives logits: no row may hold more than one sample."""
        assert not self.packed, "samples of one row would see each other"
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_HOST, *_SEGMENTS)}

    def training_inputs(self) -> dict[str, Any]:
        """What a forward pass reads that gives losses, by the model's own names: one for each learned token."""
        left_out = ("labels", "segment_ids", "attention_mask") if self.packed else ("labels", "segment_ids")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_HOST, *left_out)}
        return given | {"longest": self.longest}


_HOST = ("keys", "sources", "cuts", "refused", "lengths", "longest", "filled")
_SEGMENTS = ("segment_ids", "boundaries", "learned_at", "targets")


def collate(
    rows: Sequence[Sample | Sequence[Sample]],
    *,
    pad_id: int,
    side: PadSide,
    tokens_per_view: int,
    patches_per_view: int | None = None,
) -> MultimodalBatch:
    """Pad, and count rows and slots over the whole batch.

    Several samples in one row are its segments: positions start anew with each, and none of their first tokens is
    learned, as it would be from the segment before. ``tokens_per_view`` are the LLM's, ``patches_per_view`` the tower's
    where a plan pools.

    A batch without a single image carries one blank view that no position points at, so that the vision path runs on
    every step of every rank and contributes exactly zero.
    """
    packed = [[row] if isinstance(row, Sample) else list(row) for row in rows]
    samples = [sample for row in packed for sample in row]
    images = sum(s.images for s in samples)
    longest = max(sum(len(s.input_ids) for s in row) for row in packed)
    views = [s.views[: s.images] for s in samples] + [s.views[s.images :] for s in samples]
    parts: dict[str, list[Tensor]] = {name: [] for name in ("sequence_rows", "group_rows", "vit_rows", "token_index")}
    patches = tokens_per_view if patches_per_view is None else patches_per_view
    per_views = {"sequence_rows": tokens_per_view, "group_rows": tokens_per_view, "vit_rows": patches}
    slots, first_image, first_tile = 0, 0, images
    for sample in samples:
        for name, per_view in per_views.items():
            own = getattr(sample, name)
            split = sample.images * per_view
            moved = torch.where(own < split, own + first_image * per_view, own - split + first_tile * per_view)
            parts[name].append(torch.where(own < 0, own, moved))
        index = sample.token_index
        parts["token_index"].append(torch.where(index < 0, index, index + slots))
        slots += len(sample.sequence_rows)
        first_image += sample.images
        first_tile += len(sample.views) - sample.images
    if not images:
        views.append(samples[0].views.new_zeros(1, *samples[0].views.shape[1:]))
        parts["sequence_rows"].append(torch.arange(tokens_per_view))
        for name in ("group_rows", "vit_rows"):
            parts[name].append(torch.full((getattr(samples[0], name).shape[0], per_views[name]), -1))

    def pad(each: list[Tensor], value: int) -> Tensor:
        out, first = torch.full((len(packed), longest), value, dtype=torch.long), 0
        for place, row in zip(out, packed, strict=True):
            joined = torch.cat(each[first : first + len(row)])
            (place[: len(joined)] if side is PadSide.right else place[longest - len(joined) :]).copy_(joined)
            first += len(row)
        return out

    segment_ids = pad([torch.full_like(s.input_ids, i) for row in packed for i, s in enumerate(row, 1)], 0)
    mask, boundaries = (segment_ids > 0).long(), _boundaries(segment_ids)
    if len(samples) > len(packed):
        positions = pad([torch.arange(len(s.input_ids)) for s in samples], 0)
    else:
        right = side is PadSide.right
        positions = torch.arange(longest).expand_as(mask) if right else (mask.cumsum(1) - 1).clamp_min(0)
    labels = pad([_learned(s, i) for row in packed for i, s in enumerate(row)], IGNORE_INDEX)
    next_label = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1).flatten()
    learned_at = (next_label != IGNORE_INDEX).nonzero().squeeze(1)
    if not len(learned_at):  # nothing to learn: a position whose loss is zero
        learned_at = torch.tensor([next_label.numel() - 1])
    rows_of = {name: torch.cat(parts[name], dim=1) for name in ("group_rows", "vit_rows")}
    return MultimodalBatch(
        input_ids=pad([s.input_ids for s in samples], pad_id),
        labels=labels,
        attention_mask=mask.bool(),
        position_ids=positions.contiguous(),
        views=torch.cat(views),
        token_index=pad(parts["token_index"], -1),
        sequence_rows=torch.cat(parts["sequence_rows"]),
        **rows_of,
        keys=[s.key for s in samples],
        sources=[s.source for s in samples],
        cuts=[s.cut for s in samples],
        refused=[s.refused for s in samples],
        lengths=[len(s.input_ids) for s in samples],
        segment_ids=segment_ids,
        boundaries=boundaries.int(),
        longest=int(boundaries.diff().max()),
        learned_at=learned_at,
        targets=next_label[learned_at],
        filled={name: [int(n) for n in (own != -1).sum(1)] for name, own in rows_of.items()},
    )


def _boundaries(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, " ends"]:
    """Where the segments of all rows begin, and where the last one ends."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids.diff(dim=1) != 0
    ends = torch.tensor([segment_ids.numel()])
    return torch.cat([begins.flatten().nonzero().squeeze(1), ends])


def _learned(sample: Sample, place: int) -> Int[Tensor, " t"]:
    """The labels of the segment at ``place`` in its row."""
    return (
        sample.labels
        if place == 0
        else torch.cat([torch.full_like(sample.labels[:1], IGNORE_INDEX), sample.labels[1:]])
    )
