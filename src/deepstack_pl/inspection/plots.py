"""Pictures of plans, as matplotlib figures without pyplot's global state.

The palette is Okabe and Ito's, which stays apart for colour-blind readers.
"""

from math import isqrt

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from numpy.typing import NDArray

from deepstack_pl.stacking.config import Dealt, Encoding, Host, Injection, Operator, Resize, Sequence, Source
from deepstack_pl.stacking.mosaic import deal
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.stacking.rules import ALIGNED, WITH_TILES

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#5F4B8B",
    "#A4243B",
    "#7A9E2E",
    "#2F4858",
    "#B388EB",
)
_AGAIN = "#5B6770"  # the global view once more
INK, PALE, RIGHT, WRONG = "#222222", "#9AA0A6", "#0B7A4B", "#C4401C"  # also of the pages
_PAPER = "#F4F4F1"
_PATCHES = 4  # a side of a tile in the little mosaic
_FLOOR, _TOP = 0.13, 0.84  # where the stacks of layers stand
_TOWER, _LLM, _WIDTH = 0.06, 0.70, 0.17  # left edges and width of the two stacks
_MIDDLE = 0.445  # left edge of the group tiles


def plan_figure(plan: Plan, tokens_per_view: int) -> Figure:
    """Both hosts as stacks of layers, the mosaic as it is dealt, and an arrow for every injection."""
    figure = Figure(figsize=(10, 6.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    axes.text(_TOWER, 0.95, plan.name, fontsize=16, weight="bold", color=INK)
    axes.text(_TOWER, 0.915, _summary(plan, tokens_per_view), fontsize=9, color=PALE)
    views = ["global view"] + ["tiles"] * bool(plan.tiles) + ["details"] * (plan.detail > 1)
    _stack(axes, plan, Host.vit, _TOWER, "vision tower", ", ".join(views))
    _stack(axes, plan, Host.llm, _LLM, "LLM", _ENTERS[plan.sequence])
    if plan.tiles or plan.detail > 1:
        _mosaic(axes, plan)
    _arrows(axes, plan)
    if _tiles_in_text(plan) and plan.detail == 1:  # with details, it is these that are drawn, not the tiles
        line = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.7, "color": INK}
        axes.add_patch(FancyArrowPatch((0.57, _FLOOR - 0.028), (_LLM + 0.005, _FLOOR - 0.028), **line))
    notes = [f"dropped beyond the depth: {injection}" for injection in plan.dropped]
    if any(injection.operator is Operator.gated_add for injection in plan.injections):
        notes.append("dashed: through a learned gate")
    notes += ["no injections: nothing is stacked"] if not plan.injections else []
    notes += plan.notes()
    axes.text(0.5, 0.03, "   ·   ".join(notes), fontsize=9, color=WRONG if plan.dropped else PALE, ha="center")
    return figure


def to_pixels(figure: Figure) -> UInt8[NDArray, "h w 3"]:
    """What the figure looks like."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(plan: Plan, tokens_per_view: int) -> str:
    context, seen = plan.context_tokens(tokens_per_view), plan.seen_tokens(tokens_per_view)
    dealt = f", {plan.most_tiles} tiles" if plan.tiles else ""
    dealt += ", letter-boxed" if plan.resize is Resize.letterbox else ""
    dealt += ", read in one pass" if plan.encoding is Encoding.one_pass else ""
    dealt += f", {plan.pooling} x {plan.pooling} tokens as one" if plan.pooling > 1 else ""
    dealt += f", {plan.detail} x {plan.detail} details" if plan.detail > 1 else ""
    dealt += f", dealt {plan.dealing.value}" if plan.tiles or plan.detail > 1 else ""
    return f"{context:,} tokens of context hold {seen:,} visual tokens an image{dealt}   ·   {plan.digest}"


_ENTERS = {
    Sequence.global_view: "text and global view",
    Sequence.global_and_tiles: "text, global view, tiles",
    Sequence.tiles: "text and tiles",
    Sequence.blank: "text and blanks",
    Sequence.channels: "text, groups side by side",
}


def _tiles_in_text(plan: Plan) -> bool:
    return plan.sequence in WITH_TILES


def colour(dealt: Dealt) -> str:
    """The colour that stands for a group in every picture."""
    source, group = dealt
    shift = len(PALETTE) // 2 if source is Source.spatial else 0
    return _AGAIN if source is Source.global_view else PALETTE[(group + shift) % len(PALETTE)]


def _height(plan: Plan, host: Host) -> float:
    """Height of one layer: both stacks are equally high."""
    return (_TOP - _FLOOR) / max(1, plan.llm_layers if host is Host.llm else plan.vit_layers + 1)


def _stack(axes: Axes, plan: Plan, host: Host, left: float, name: str, below: str) -> None:
    """One host, input at the bottom; layers that receive are tinted with their groups' colours."""
    layers, height = plan.at(host), _height(plan, host)
    count = plan.llm_layers if host is Host.llm else plan.vit_layers + 1
    size = min(9.0, 430 * height * 0.62)
    for layer in range(count):
        received = layers.get(layer, ())
        bottom = _FLOOR + layer * height
        box = FancyBboxPatch(
            (left, bottom + 0.12 * height),
            _WIDTH,
            0.76 * height,
            boxstyle="round,pad=0,rounding_size=0.006",
            facecolor=colour(received[0].dealt) + "26" if received else _PAPER,
            edgecolor=colour(received[0].dealt) if received else "#D4D4CF",
            linewidth=1.4 if received else 0.8,
        )
        axes.add_patch(box)
        feature = host is Host.vit and layer == plan.vit_layers
        label = "feature" if feature else f"{'layer' if host is Host.llm else 'block'} {layer}"
        if size >= 5 or received or layer % 5 == 0:
            shade = INK if received or feature else PALE
            axes.text(
                left + _WIDTH / 2,
                bottom + height / 2,
                label,
                fontsize=max(size, 5),
                ha="center",
                va="center",
                color=shade,
            )
    axes.text(left + _WIDTH / 2, _TOP + 0.012, name, fontsize=11, ha="center", weight="bold", color=INK)
    axes.text(left + _WIDTH / 2, _FLOOR - 0.035, below, fontsize=9, ha="center", color=INK)


def _mosaic(axes: Axes, plan: Plan) -> None:
    """The enlarged image's tokens, or with details an enlarged view's, each in the colour of its group."""
    source = Source.detail if plan.detail > 1 else Source.tiles
    side = plan.detail if plan.detail > 1 else isqrt(plan.most_tiles)
    grid = (side, side) if plan.detail > 1 or side * side == plan.most_tiles else (plan.most_tiles, 1)
    idle = plan.idle_detail if plan.detail > 1 else plan.idle_groups
    columns, rows = grid[0] * _PATCHES, grid[1] * _PATCHES
    cell = min(0.16 / columns, 0.16 / rows)
    across = cell * 6.2 / 10  # the figure is wider than high
    left, bottom = 0.465 - across * columns / 2, _FLOOR
    for group, tokens in enumerate(deal(grid, _PATCHES, plan.dealing).tolist()):
        for token in tokens:
            number, patch = divmod(token, _PATCHES * _PATCHES)
            x = (number % grid[0]) * _PATCHES + patch % _PATCHES
            y = rows - 1 - ((number // grid[0]) * _PATCHES + patch // _PATCHES)
            face = colour((source, group)) if group not in idle else "#D4D4CF"
            axes.add_patch(
                Rectangle(
                    (left + x * across, bottom + y * cell),
                    across,
                    cell,
                    facecolor=face,
                    edgecolor="white",
                    linewidth=0.5,
                )
            )
    for line in range(1, grid[0]):
        x = left + line * _PATCHES * across
        axes.plot([x, x], [bottom, bottom + rows * cell], color=INK, linewidth=1.1)
    for line in range(1, grid[1]):
        y = bottom + line * _PATCHES * cell
        axes.plot([left, left + columns * across], [y, y], color=INK, linewidth=1.1)
    what = "a view's" if plan.detail > 1 else "mosaic of"
    what += f" {grid[0]} x {grid[1]} {'details' if plan.detail > 1 else 'tiles'}, dealt"
    axes.text(0.465, _FLOOR - 0.035, what, fontsize=9, ha="center", color=INK)


def _arrows(axes: Axes, plan: Plan) -> None:
    """A small square for each group that is injected, and from it an arrow to every place it enters."""
    groups = list(dict.fromkeys(i.dealt for i in sorted(plan.injections, key=lambda i: (i.layer, i.group))))
    low, high = _FLOOR + 0.24, _TOP - 0.03
    step = (high - low) / max(1, len(groups) - 1) if len(groups) > 1 else 0.0
    size = min(0.05, (high - low) / max(1, len(groups)) * 0.7)
    for place, dealt in enumerate(groups):
        y = low + place * step if len(groups) > 1 else (low + high) / 2
        own = [injection for injection in plan.injections if injection.dealt == dealt]
        if dealt[0] in ALIGNED:
            read = plan.taps[dealt[1]] if dealt[0] is Source.tap else plan.vit_layers
            bottom = _FLOOR + (read + 0.12) * _height(plan, Host.vit)  # as it enters that block
            line = {"linewidth": 1.0, "color": colour(dealt), "solid_capstyle": "round"}
            axes.plot([_TOWER + _WIDTH + 0.004, _MIDDLE - 0.006], [bottom, y], **line)
        _group_square(axes, own[0], y, size)
        for injection in own:
            _arrow(axes, plan, injection, y, size)


def _group_square(axes: Axes, injection: Injection, y: float, size: float) -> None:
    across = size * 6.2 / 10 / _PATCHES
    for row in range(_PATCHES):
        for column in range(_PATCHES):
            corner = (_MIDDLE + column * across, y - size / 2 + row * size / _PATCHES)
            look = {"facecolor": colour(injection.dealt), "edgecolor": "white", "linewidth": 0.5}
            axes.add_patch(Rectangle(corner, across, size / _PATCHES, **look))
    axes.text(_MIDDLE + size * 0.31, y + size / 2 + 0.008, injection.what, fontsize=7.5, color=INK, ha="center")


def _arrow(axes: Axes, plan: Plan, injection: Injection, y: float, size: float) -> None:
    height = _height(plan, injection.host)
    target = _FLOOR + (injection.layer + 0.12) * height  # before the layer: at its lower edge
    right = injection.host is Host.llm
    start = (_MIDDLE + (size * 0.62 + 0.006 if right else -0.006), y)
    end = (_LLM - 0.004 if right else _TOWER + _WIDTH + 0.004, target)
    gated = injection.operator is Operator.gated_add
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={0.12 if right == (target < y) else -0.12}",
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.7,
            linestyle=(0, (4, 2)) if gated else "-",
            color=colour(injection.dealt),
            shrinkA=0,
            shrinkB=0,
        )
    )
