"""Pictures of plans and of answered pages, as matplotlib figures without pyplot's global state.

The palette is Okabe and Ito's, which stays apart for colour-blind readers.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from deepstack_pl.stacking.config import Host, Operator
from deepstack_pl.stacking.mosaic import best_grid, deal
from deepstack_pl.stacking.plan import Injection, Plan

_PALETTE = (
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
_INK, _PALE, _PAPER, _RIGHT, _WRONG = "#222222", "#9AA0A6", "#F4F4F1", "#0B7A4B", "#C4401C"
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
    axes.text(_TOWER, 0.95, plan.name, fontsize=16, weight="bold", color=_INK)
    axes.text(_TOWER, 0.915, _summary(plan, tokens_per_view), fontsize=9, color=_PALE)
    _stack(axes, plan, Host.vit, _TOWER, "vision tower", "global view and tiles" if plan.tiles else "global view")
    enters = "text, global view, groups" if _tiles_in_text(plan) else "text and global view"
    _stack(axes, plan, Host.llm, _LLM, "LLM", enters)
    if plan.tiles:
        _mosaic(axes, plan)
        _arrows(axes, plan)
    if _tiles_in_text(plan):
        line = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.7, "color": _INK}
        axes.add_patch(FancyArrowPatch((0.57, _FLOOR - 0.028), (_LLM + 0.005, _FLOOR - 0.028), **line))
    notes = [f"dropped beyond the depth: {injection}" for injection in plan.dropped]
    if any(injection.operator is Operator.gated_add for injection in plan.injections):
        notes.append("dashed: through a learned gate")
    notes += ["no injections: nothing is stacked"] if not plan.injections else []
    if plan.idle_groups:
        notes.append("dealt but injected nowhere: groups " + ", ".join(map(str, plan.idle_groups)))
    axes.text(0.5, 0.03, "   ·   ".join(notes), fontsize=9, color=_WRONG if plan.dropped else _PALE, ha="center")
    return figure


def page_figure(
    page: Image.Image,
    view: Float[NDArray, "s s 3"] | None,
    *,
    prompt: str,
    prediction: str,
    answer: str,
    facts: Sequence[str],
    correct: Sequence[bool],
    title: str = "",
) -> Figure:
    """A page, its global view as the model sees it (0 to 1; None: left out), and the answer fact by fact."""
    columns = _columns(facts)
    figure = Figure(figsize=(11, 1.2 + max(2.6, 0.34 * ceil(len(facts) / columns))), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    pictures = [("page", np.asarray(page.convert("RGB")))] + ([("global view", view)] if view is not None else [])
    for number, (name, pixels) in enumerate(pictures):
        axes = figure.add_axes((0.03 + 0.255 * number, 0.03, 0.235, 0.80))
        axes.imshow(pixels, interpolation="nearest")
        axes.set_anchor("N")
        axes.set_title(f"{name}, {pixels.shape[1]} x {pixels.shape[0]}", fontsize=9, color=_PALE)
        axes.axis("off")
    figure.text(0.03, 0.935, title, fontsize=11, weight="bold", color=_INK)
    figure.text(
        0.97, 0.935, f"{sum(correct)} of {len(facts)} right", fontsize=11, weight="bold", color=_INK, ha="right"
    )
    axes = figure.add_axes((0.055 + 0.255 * len(pictures), 0.05, 0.93 - 0.255 * len(pictures), 0.82))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    axes.text(0, 1, _shorten(prompt, 150), fontsize=9, color=_PALE, va="top", wrap=True)
    words = prediction.split() if len(facts) > 1 else [prediction]
    _answer(axes, words, facts, correct, columns)
    if len(words) > len(facts):
        axes.text(0, 0, _shorten("and then: " + " ".join(words[len(facts) :]), 80), fontsize=8, color=_WRONG)
    if prediction.strip() != answer.strip() and len(facts) > 1 and all(correct):
        axes.text(1, 0, "all facts right, answer not exact", fontsize=8, color=_PALE, ha="right")
    return figure


def to_pixels(figure: Figure) -> UInt8[NDArray, "h w 3"]:
    """What the figure looks like."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(plan: Plan, tokens_per_view: int) -> str:
    context, seen = plan.context_tokens(tokens_per_view), plan.seen_tokens(tokens_per_view)
    dealt = f", {plan.tiles} tiles dealt {plan.dealing.value}" if plan.tiles else ""
    return f"{context:,} tokens of context hold {seen:,} visual tokens an image{dealt}   ·   {plan.digest}"


def _tiles_in_text(plan: Plan) -> bool:
    return plan.context_tokens(1) > 1


def _colour(group: int) -> str:
    return _PALETTE[group % len(_PALETTE)]


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
            facecolor=_colour(received[0].group) + "26" if received else _PAPER,
            edgecolor=_colour(received[0].group) if received else "#D4D4CF",
            linewidth=1.4 if received else 0.8,
        )
        axes.add_patch(box)
        feature = host is Host.vit and layer == plan.vit_layers
        label = "feature" if feature else f"{'layer' if host is Host.llm else 'block'} {layer}"
        if size >= 5 or received or layer % 5 == 0:
            colour = _INK if received or feature else _PALE
            axes.text(
                left + _WIDTH / 2,
                bottom + height / 2,
                label,
                fontsize=max(size, 5),
                ha="center",
                va="center",
                color=colour,
            )
    axes.text(left + _WIDTH / 2, _TOP + 0.012, name, fontsize=11, ha="center", weight="bold", color=_INK)
    axes.text(left + _WIDTH / 2, _FLOOR - 0.035, below, fontsize=9, ha="center", color=_INK)


def _mosaic(axes: Axes, plan: Plan) -> None:
    """The enlarged image's tokens, each in the colour of the group that it is dealt to."""
    tile = 16
    side = round(plan.tiles**0.5)
    size = (side * tile, side * tile) if side * side == plan.tiles else (plan.tiles * tile, tile)
    grid = best_grid(*size, tile=tile, tiles=plan.tiles, rule=plan.grid)
    columns, rows = grid[0] * _PATCHES, grid[1] * _PATCHES
    cell = min(0.16 / columns, 0.16 / rows)
    across = cell * 6.2 / 10  # the figure is wider than high
    left, bottom = 0.465 - across * columns / 2, _FLOOR
    for group, tokens in enumerate(deal(grid, _PATCHES, plan.dealing).tolist()):
        for token in tokens:
            number, patch = divmod(token, _PATCHES * _PATCHES)
            x = (number % grid[0]) * _PATCHES + patch % _PATCHES
            y = rows - 1 - ((number // grid[0]) * _PATCHES + patch // _PATCHES)
            colour = _colour(group) if group not in plan.idle_groups else "#D4D4CF"
            axes.add_patch(
                Rectangle(
                    (left + x * across, bottom + y * cell),
                    across,
                    cell,
                    facecolor=colour,
                    edgecolor="white",
                    linewidth=0.5,
                )
            )
    for line in range(1, grid[0]):
        x = left + line * _PATCHES * across
        axes.plot([x, x], [bottom, bottom + rows * cell], color=_INK, linewidth=1.1)
    for line in range(1, grid[1]):
        y = bottom + line * _PATCHES * cell
        axes.plot([left, left + columns * across], [y, y], color=_INK, linewidth=1.1)
    axes.text(
        0.465, _FLOOR - 0.035, f"mosaic of {grid[0]} x {grid[1]} tiles, dealt", fontsize=9, ha="center", color=_INK
    )


def _arrows(axes: Axes, plan: Plan) -> None:
    """A small square for each group that is injected, and from it an arrow to every place it enters."""
    groups = sorted({injection.group for injection in plan.injections})
    low, high = _FLOOR + 0.24, _TOP - 0.03
    step = (high - low) / max(1, len(groups) - 1) if len(groups) > 1 else 0.0
    size = min(0.05, (high - low) / max(1, len(groups)) * 0.7)
    for place, group in enumerate(groups):
        y = low + place * step if len(groups) > 1 else (low + high) / 2
        _group_square(axes, group, y, size)
        for injection in plan.injections:
            if injection.group == group:
                _arrow(axes, plan, injection, y, size)


def _group_square(axes: Axes, group: int, y: float, size: float) -> None:
    across = size * 6.2 / 10 / _PATCHES
    for row in range(_PATCHES):
        for column in range(_PATCHES):
            corner = (_MIDDLE + column * across, y - size / 2 + row * size / _PATCHES)
            axes.add_patch(
                Rectangle(corner, across, size / _PATCHES, facecolor=_colour(group), edgecolor="white", linewidth=0.5)
            )
    axes.text(_MIDDLE + size * 0.31, y + size / 2 + 0.008, f"group {group}", fontsize=7.5, color=_INK, ha="center")


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
            color=_colour(injection.group),
            shrinkA=0,
            shrinkB=0,
        )
    )


def _columns(facts: Sequence[str]) -> int:
    """Words in a row of the answer: a square page's own number where it is one."""
    side = round(len(facts) ** 0.5)
    longest = max((len(fact) for fact in facts), default=1)
    return side if side * side == len(facts) and side * longest <= 60 else max(1, min(len(facts), 56 // (longest + 2)))


def _answer(axes: Axes, words: Sequence[str], facts: Sequence[str], correct: Sequence[bool], columns: int) -> None:
    rows = ceil(len(facts) / columns)
    pitch = min(0.13, 0.74 / rows)
    for number, (fact, right) in enumerate(zip(facts, correct, strict=True)):
        x, y = (number % columns) / columns, 0.80 - (number // columns) * pitch
        said = words[number] if number < len(words) else "(nothing)"
        room = max(8, round(52 / columns))
        colour = _RIGHT if right else _WRONG
        axes.text(x, y, _shorten(said, room), fontsize=10, family="monospace", color=colour, weight="bold", va="top")
        if not right:
            below = y - min(0.055, 0.45 * pitch)
            axes.text(x, below, _shorten(fact, room + 4), fontsize=7, family="monospace", color=_PALE, va="top")


def _shorten(text: str, room: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= room else flat[: room - 1] + "…"
