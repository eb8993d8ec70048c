"""The shared nouns: one sample, one batch, and how samples become a batch.

Axes: ``b`` samples, ``t`` positions, ``v`` views, ``n`` slots (positions that images take, over the whole batch),
``g`` groups entering the LLM, ``h`` groups entering the vision tower, ``m`` patches of all global views.
A *row* is ``view * tokens_per_view + patch``; global views come first, then all others (tiles, details). Below zero it
is none: -1 stands for nothing, -2 for the learned newline.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
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


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance; ``<image>`` in it stands for the next image."""

    role: Role
    text: str


@dataclass(kw_only=True, slots=True)
class Record:
    """One conversation as read from a source, decoded.

    Attributes:
        key: names it in messages: shard and key, or file and row.
        kind: what it asks for (``coarse``, ``fine``, ...); metrics are reported by kind.
        facts: the parts of its last answer that are scored one by one; the whole answer where nothing finer is known.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    kind: str = "answer"
    facts: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class Sample:
    """One conversation, expanded: every image placeholder is already as many positions as its image takes.

    Attributes:
        key: where it came from, for messages.
        labels: unshifted; -100 where nothing is learned.
        views: the sample's global views, in order, then its other views, image by image.
        images: how many global views.
        token_index: for each position its slot, -1 at text.
        sequence_rows: for each slot the row that stands in the text sequence.
        group_rows: for each group and slot the row added in the LLM.
        vit_rows: for each group and patch of the global views the row added in the tower, where a view has as many
            tokens as patches; in the LLM it has fewer if the plan pools.
        cut: positions that were cut off because the sample was too long.
    """

    key: str
    input_ids: Int[Tensor, " t"]
    labels: Int[Tensor, " t"]
    views: Float[Tensor, "v 3 s s"]
    images: int
    token_index: Int[Tensor, " t"]
    sequence_rows: Int[Tensor, " n"]
    group_rows: Int[Tensor, "g n"]
    vit_rows: Int[Tensor, "h m"]
    cut: int = 0


@dataclass(kw_only=True, slots=True)
class MultimodalBatch:
    """What the model reads; the fields are its ``forward``'s keywords, but for ``keys`` and ``cut``.

    Attributes:
        cut: positions that were cut off its samples.
    """

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    views: Float[Tensor, "v 3 s s"]
    token_index: Int[Tensor, "b t"]
    sequence_rows: Int[Tensor, " n"]
    group_rows: Int[Tensor, "g n"]
    vit_rows: Int[Tensor, "h m"]
    keys: list[str]
    cut: int = 0

    def to(self, device: torch.device | str) -> "MultimodalBatch":
        """The same batch on ``device``."""
        moved = {name: value.to(device) for name, value in self.model_inputs().items()}
        return MultimodalBatch(**moved, keys=self.keys, cut=self.cut)

    def model_inputs(self) -> dict[str, Tensor]:
        """The tensors, by the model's own names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("keys", "cut")}


def collate(
    samples: Sequence[Sample], *, pad_id: int, side: PadSide, tokens_per_view: int, patches_per_view: int | None = None
) -> MultimodalBatch:
    """Pad, and count rows and slots over the whole batch.

    ``tokens_per_view`` are the LLM's, ``patches_per_view`` the tower's where a plan pools.

    A batch without a single image carries one blank view that no position points at, so that the vision path runs on
    every step of every rank and contributes exactly zero.
    """
    images = sum(s.images for s in samples)
    longest = max(len(s.input_ids) for s in samples)
    views = [s.views[: s.images] for s in samples] + [s.views[s.images :] for s in samples]
    parts: dict[str, list[Tensor]] = {name: [] for name in ("sequence_rows", "group_rows", "vit_rows", "token_index")}
    patches = tokens_per_view if patches_per_view is None else patches_per_view
    per_views = {"sequence_rows": tokens_per_view, "group_rows": tokens_per_view, "vit_rows": patches}
    slots, first_image, first_tile = 0, 0, images
    for sample in samples:
        for name, per_view in per_views.items():
            rows = getattr(sample, name)
            split = sample.images * per_view
            moved = torch.where(rows < split, rows + first_image * per_view, rows - split + first_tile * per_view)
            parts[name].append(torch.where(rows < 0, rows, moved))
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

    def pad(rows: list[Tensor], value: int) -> Tensor:
        out = torch.full((len(rows), longest), value, dtype=torch.long)
        for place, row in zip(out, rows, strict=True):
            (place[: len(row)] if side is PadSide.right else place[longest - len(row) :]).copy_(row)
        return out

    mask = pad([torch.ones(len(s.input_ids), dtype=torch.long) for s in samples], 0)
    positions = torch.arange(longest).expand_as(mask) if side is PadSide.right else (mask.cumsum(1) - 1).clamp_min(0)
    return MultimodalBatch(
        input_ids=pad([s.input_ids for s in samples], pad_id),
        labels=pad([s.labels for s in samples], IGNORE_INDEX),
        attention_mask=mask.bool(),
        position_ids=positions.contiguous(),
        views=torch.cat(views),
        token_index=pad(parts["token_index"], -1),
        sequence_rows=torch.cat(parts["sequence_rows"]),
        group_rows=torch.cat(parts["group_rows"], dim=1),
        vit_rows=torch.cat(parts["vit_rows"], dim=1),
        keys=[s.key for s in samples],
        cut=sum(s.cut for s in samples),
    )
