"""Ids and images to one sample: every position is built once, here, after expansion, per image.

Axes: as in `deepstack_pl.batch`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from deepstack_pl.batch import IGNORE_INDEX, Reason, Refused, Sample
from deepstack_pl.language.config import TooLong
from deepstack_pl.stacking.config import Host
from deepstack_pl.stacking.mosaic import ImageTables, image_tables
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.views import no_views, views_of


def make_sample(
    key: str,
    ids: Sequence[int],
    labels: Sequence[int],
    images: Sequence[Image.Image],
    *,
    plan: Plan,
    vision: VisionConfig,
    image_token_id: int,
    max_length: int,
    too_long: TooLong = TooLong.refuse,
    backend: ViewsBackend = ViewsBackend.pil,
) -> Sample:
    """Expand each placeholder to the positions its image takes, and say which token goes where.

    A sample that is cut as published keeps the slots of all its images: positions beyond the cut are what is missing.
    Where only text is cut, an image that does not fit in whole is left out with all that follows it.

    Raises:
        Refused: placeholders and images differ in number, or the sample is longer than ``max_length`` positions and
            must not be cut.
    """
    placeholders = sum(token == image_token_id for token in ids)
    if placeholders != len(images):
        raise Refused(
            Reason.conversation,
            f"sample {key!r}: the text holds {placeholders} image placeholders, but {len(images)} images were given. "
            "Each placeholder (<image>) needs one image, in order.",
        )
    cut = [views_of(image, plan, vision, backend) for image in images]
    tables = [image_tables(plan, grid, vision.patches_per_side) for _, grid in cut]
    token_ids, token_labels, index = _expand(ids, labels, image_token_id, tables)
    kept = min(len(token_ids), max_length)
    cut_off = len(token_ids) - kept
    if cut_off and too_long is TooLong.refuse:
        raise Refused(
            Reason.too_long,
            f"sample {key!r}: {len(token_ids)} positions, {int((index >= 0).sum())} of them visual, but llm.max_length "
            f"is {max_length}. Raise llm.max_length, shorten or leave out the sample, or say llm.too_long=cut_text.",
        )
    if cut_off and too_long is TooLong.cut_text:
        whole, kept = _whole_images(index, tables, kept)
        cut_off = len(token_ids) - kept
        cut, tables = cut[:whole], tables[:whole]
    views = [v[:1] for v, _ in cut] + [v[1:] for v, _ in cut]
    rows = _rows(plan, vision, [len(v) for v, _ in cut], tables)
    return Sample(
        key=key,
        input_ids=token_ids[:kept],
        labels=token_labels[:kept],
        views=torch.cat(views) if views else no_views(vision),
        images=len(cut),
        token_index=index[:kept],
        sequence_rows=rows["sequence_rows"],
        group_rows=rows["group_rows"],
        vit_rows=rows["vit_rows"],
        cut=cut_off,
    )


def _expand(
    ids: Sequence[int], labels: Sequence[int], image_token_id: int, tables: list[ImageTables]
) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"], Int[Tensor, " t"]]:
    """Ids, labels and slots; slots are numbered on through the sample's images."""
    token_ids: list[int] = []
    token_labels: list[int] = []
    index: list[int] = []
    slot, image = 0, 0
    for token, label in zip(ids, labels, strict=True):
        if token != image_token_id:
            token_ids.append(token)
            token_labels.append(label)
            index.append(-1)
            continue
        slots = len(tables[image].sequence)
        token_ids += [token] * slots
        token_labels += [IGNORE_INDEX] * slots
        index += range(slot, slot + slots)
        slot, image = slot + slots, image + 1
    return torch.tensor(token_ids), torch.tensor(token_labels), torch.tensor(index)


def _whole_images(index: Int[Tensor, " t"], tables: list[ImageTables], kept: int) -> tuple[int, int]:
    """How many images lie whole within the first ``kept`` positions, and how many positions are left with those."""
    slots = 0
    for image, table in enumerate(tables):
        slots += len(table.sequence)
        if int((index[:kept] >= 0).sum()) < slots:
            first = slots - len(table.sequence)
            return image, min(kept, int((index == first).nonzero()[0]))
    return len(tables), kept


def _rows(plan: Plan, vision: VisionConfig, views: list[int], tables: list[ImageTables]) -> dict[str, Tensor]:
    """Each image's rows, moved to the sample's order: global views first, then all others."""
    patches = vision.patches_per_side**2
    pooled = patches // plan.pooling**2
    rows: dict[str, list[Tensor]] = {
        "sequence_rows": [torch.empty(0, dtype=torch.long)],
        "group_rows": [torch.empty(len(plan.groups(Host.llm)), 0, dtype=torch.long)],
        "vit_rows": [torch.empty(len(plan.groups(Host.vit)), 0, dtype=torch.long)],
    }
    first_tile = len(views)
    for number, (count, table) in enumerate(zip(views, tables, strict=True)):
        for name, own, per_view in (
            ("sequence_rows", table.sequence, pooled),
            ("group_rows", table.llm, pooled),
            ("vit_rows", table.vit, patches),
        ):
            moved = torch.where(own < per_view, own + number * per_view, own + (first_tile - 1) * per_view)
            rows[name].append(torch.where(own < 0, own, moved))
        first_tile += count - 1
    return {name: torch.cat(each, dim=-1) for name, each in rows.items()}
