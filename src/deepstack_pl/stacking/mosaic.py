"""Tiles laid on one grid, and dealt into groups: as index tables, so that a forward pass only gathers.

A *row* names one token of one sample's encoded views: ``view * p * p + patch``. Axes: ``g`` groups, ``n`` slots (the
positions an image takes in the text), ``p`` patches a side. Method A.1 to A.3.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from deepstack_pl.stacking.config import Dealing, GridRule, Host, Sequence
from deepstack_pl.stacking.plan import Plan


def best_grid(width: int, height: int, *, tile: int, tiles: int, rule: GridRule) -> tuple[int, int]:
    """The grid ``(columns, rows)`` that an image of ``width`` x ``height`` pixels becomes, tiles ``tile`` pixels wide.

    ``best_fit`` is LLaVA's rule: most effective pixels, then least waste, then the first of all grids with at most
    ``tiles`` cells in the order of columns, rows. 1x1 is no candidate, so that a small square image becomes 1x2, as
    published.
    """
    if rule is GridRule.square:
        side = isqrt(tiles)
        return side, side
    best, best_score = (0, 0), (-1, 0)
    for columns in range(1, tiles + 1):
        for rows in range(1, tiles // columns + 1):
            if (columns, rows) == (1, 1):
                continue
            full_w, full_h = columns * tile, rows * tile
            scale = min(full_w / width, full_h / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            score = (effective, -(full_w * full_h - effective))
            if score > best_score:
                best, best_score = (columns, rows), score
    return best


def deal(grid: tuple[int, int], patches: int, dealing: Dealing) -> Int[Tensor, "g n"]:
    """For each group, the mosaic tokens it holds, as ``tile * p * p + patch`` with tiles in raster order."""
    columns, rows = grid
    tokens = torch.arange(columns * rows * patches * patches)
    if dealing is Dealing.tiles:
        return tokens.view(rows * columns, patches * patches)
    mosaic = rearrange(tokens, "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=patches, w=patches)
    if dealing is Dealing.strided_1d:
        return rearrange(mosaic, "y x -> (y x)").view(-1, rows * columns).T.contiguous()
    return rearrange(mosaic, "(h r) (w c) -> (r c) (h w)", r=rows, c=columns)


@dataclass(frozen=True, slots=True)
class ImageTables:
    """Where one image's tokens go. Rows count this image's views alone: 0 is the global view, then the tiles.

    Attributes:
        sequence: the rows that stand in the text sequence, one a slot.
        llm: for each group of the plan that enters the LLM, the row added at each slot (-1: none).
        vit: for each group that enters the tower, the row added at each patch of the global view (-1: none).
    """

    sequence: Int[Tensor, " n"]
    llm: Int[Tensor, "g n"]
    vit: Int[Tensor, "h p2"]


def image_tables(plan: Plan, grid: tuple[int, int] | None, patches: int) -> ImageTables:
    """The tables of an image enlarged to ``grid`` (None: the global view alone) under ``plan``.

    Groups that a small grid does not fill add nothing (published: zero groups, method A.3).
    """
    per_view = patches * patches
    groups = deal(grid, patches, plan.dealing) + per_view if grid else torch.empty(0, per_view, dtype=torch.long)
    sequence = torch.arange(per_view)
    if plan.sequence is Sequence.global_and_tiles:
        sequence = torch.cat([sequence, groups.flatten()])

    def table(host: Host, slots: int) -> Tensor:
        rows = torch.full((len(plan.groups(host)), slots), -1)
        for row, group in enumerate(plan.groups(host)):
            if group < len(groups):
                rows[row, :per_view] = groups[group]
        return rows

    return ImageTables(sequence, table(Host.llm, len(sequence)), table(Host.vit, per_view))
