"""Tiles laid on one grid, and dealt into groups: as index tables, so that a forward pass only gathers.

A *row* names one token of one sample's encoded views: ``view * p * p + patch``; `NOTHING` and `NEWLINE` are no rows.
Views are the global view, the tiles in raster order, then the details: of the global view, then tile by tile, each in
raster order. Axes: ``g`` groups, ``n`` slots (the positions an image takes in the text), ``p`` patches a side. Method
A.1 to A.3, A.6, A.7.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from deepstack_pl.stacking.config import (
    Dealing,
    Dealt,
    GridRule,
    Host,
    Newline,
    Order,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.injection import NEWLINE, NOTHING
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.stacking.rules import ALIGNED


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
    if dealing is Dealing.scattered:
        anywhere = torch.randperm(mosaic.numel(), generator=torch.Generator().manual_seed(0))
        return mosaic.flatten()[anywhere].view(rows * columns, -1)
    return rearrange(mosaic, "(h r) (w c) -> (r c) (h w)", r=rows, c=columns)


@dataclass(frozen=True, slots=True)
class ImageTables:
    """Where one image's tokens go. Rows count this image's views alone.

    Attributes:
        sequence: the rows that stand in the text sequence, one a slot.
        llm: for each group that enters the LLM, the row at each slot.
        vit: for each group that enters the tower, the row added at each patch of the global view.
    """

    sequence: Int[Tensor, " n"]
    llm: Int[Tensor, "g n"]
    vit: Int[Tensor, "h p2"]


def image_tables(plan: Plan, grid: tuple[int, int] | None, patches: int) -> ImageTables:
    """The tables of an image enlarged to ``grid`` (None: the global view alone) under ``plan``.

    ``patches`` is the tower's; the LLM sees fewer where the plan pools. Groups that a small grid does not fill add
    nothing (published: zero groups, method A.3).
    """
    side = patches // plan.pooling
    sequence = _sequence(plan, grid, side)
    of_tiles = _tiles(plan, grid, side)
    llm = [_group(plan, dealt, sequence, of_tiles, grid, side) for dealt in plan.groups(Host.llm)]
    if plan.sequence is Sequence.blank:
        sequence = torch.full_like(sequence, NOTHING)
    in_tower = _tiles(plan, grid, patches)
    view = torch.arange(patches * patches)
    vit = [_group(plan, dealt, view, in_tower, grid, patches) for dealt in plan.groups(Host.vit)]
    return ImageTables(sequence, _table(llm, len(sequence)), _table(vit, len(view)))


def _tiles(plan: Plan, grid: tuple[int, int] | None, side: int) -> Int[Tensor, "g p2"]:
    """The rows of each group of tiles that ``grid`` fills."""
    if grid is None:
        return torch.empty(0, side * side, dtype=torch.long)
    return deal(grid, side, plan.dealing) + side * side


def _sequence(plan: Plan, grid: tuple[int, int] | None, side: int) -> Int[Tensor, " n"]:
    """The rows of the text sequence; of a blank one, those of the global view that it stands for."""
    parts = [] if plan.sequence is Sequence.tiles else [torch.arange(side * side)]
    if plan.sequence in (Sequence.global_and_tiles, Sequence.tiles) and grid is not None:
        parts.append(_string(plan, grid, side))
    return torch.cat(parts)


def _string(plan: Plan, grid: tuple[int, int], side: int) -> Int[Tensor, " n"]:
    """The tiles' rows as they follow each other."""
    columns, rows = grid
    if plan.order is Order.by_group:
        groups = _tiles(plan, grid, side).flatten()
        missing = plan.most_tiles * side * side - len(groups) if plan.unfilled is Unfilled.zeros else 0
        return torch.cat([groups, torch.full((missing,), NOTHING)])
    tokens = torch.arange(columns * rows * side * side) + side * side
    mosaic = rearrange(tokens, "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=side, w=side)
    if plan.newline is not Newline.none:
        mosaic = torch.cat([mosaic, torch.full((len(mosaic), 1), NEWLINE)], dim=1)
    return mosaic.flatten()


def _group(
    plan: Plan,
    dealt: Dealt,
    slots: Int[Tensor, " n"],
    of_tiles: Int[Tensor, "g p2"],
    grid: tuple[int, int] | None,
    side: int,
) -> Int[Tensor, " n"]:
    """The rows of one group, over slots that hold the rows ``slots`` (the global view's first).

    Rows of a tap or of a spatial group name tokens of their own features, laid out as the sequence's are.
    """
    source, group = dealt
    per_view = side * side
    if source is Source.detail:
        return _detail(plan, group, slots, grid, side)
    if source in ALIGNED:
        return torch.where(slots < 0, NOTHING, slots)
    rows = torch.full_like(slots, NOTHING)
    if source is Source.global_view:
        rows[:per_view] = slots[:per_view]
    elif group < len(of_tiles):
        rows[:per_view] = of_tiles[group]
    return rows


def _detail(
    plan: Plan, group: int, slots: Int[Tensor, " n"], grid: tuple[int, int] | None, side: int
) -> Int[Tensor, " n"]:
    """At each slot the token that ``group`` of its own view's details holds under that slot's patch."""
    per_view, per_group = side * side, plan.detail**2
    first = 1 + (grid[0] * grid[1] if grid else 0)  # views come before all details
    dealt = deal((plan.detail, plan.detail), side, plan.dealing)[group]
    view, patch = slots.clamp_min(0) // per_view, slots.clamp_min(0) % per_view
    rows = (first + view * per_group) * per_view + dealt[patch]
    rows = torch.where(slots == NOTHING, NOTHING, rows)
    at_newline = NEWLINE if plan.newline is Newline.rows_and_groups else NOTHING
    return torch.where(slots == NEWLINE, at_newline, rows)


def _table(rows: list[Tensor], slots: int) -> Int[Tensor, "g n"]:
    return torch.stack(rows) if rows else torch.empty(0, slots, dtype=torch.long)
