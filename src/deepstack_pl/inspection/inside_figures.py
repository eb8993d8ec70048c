"""What `inside` found, as figures."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from deepstack_pl.inspection.inside import Attention, Inside
from deepstack_pl.inspection.plots import INK, PALE, colour
from deepstack_pl.stacking.config import Host
from deepstack_pl.stacking.plan import Plan


def inside_figures(found: Inside, plan: Plan, page: Image.Image | None = None) -> dict[str, Figure]:
    """By the tag under which TensorBoard shows it."""
    figures: dict[str, Figure] = {}
    if found.effects:
        figures["injections/left out"] = left_out_figure(found)
        figures["injections/in the stream"] = stream_figure(found)
    if found.attention is not None:
        layers = [i.layer for i in plan.injections if i.host is Host.llm]
        figures["attention/visual share"] = share_figure(found.attention, layers)
        if found.attention.grid is not None and page is not None:
            figures["attention/map"] = map_figure(found.attention, page)
    return figures


def left_out_figure(found: Inside) -> Figure:
    """How much worse the answers are without each group: which layers use the detail?"""
    names = [effect.place for effect in found.effects] + ["all of them"]
    worse = [effect.left_out for effect in found.effects] + [found.loss_without - found.loss]
    colours = [colour(effect.injection.dealt) for effect in found.effects] + [INK]
    figure, axes = _axes(1.3 + 0.34 * len(names))
    axes.barh(range(len(names)), worse, color=colours, height=0.7)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"loss per answer token that leaving it out costs (with all: {found.loss:.3f})", fontsize=8)
    return figure


def stream_figure(found: Inside) -> Figure:
    """How large each addition is beside the residual stream, and whether it points along it."""
    names = [effect.place for effect in found.effects]
    figure = Figure(figsize=(8, 1.3 + 0.34 * len(names)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [colour(effect.injection.dealt) for effect in found.effects]
    ratios = [effect.ratio for effect in found.effects]
    left.barh(range(len(names)), ratios, color=colours, height=0.7)
    right.barh(range(len(names)), [effect.cosine for effect in found.effects], color=colours, height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("size of the addition over that of the stream", fontsize=8)
    right.set_xlabel("cosine between the two", fontsize=8)
    right.set_xlim(-1, 1)
    right.axvline(0, color=INK, lw=0.8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def share_figure(found: Attention, injected: list[int]) -> Figure:
    """Attention of answer positions on visual ones, by layer; ticks mark layers that a group enters."""
    figure, axes = _axes(3.0)
    layers = range(len(found.with_all))
    axes.plot(layers, found.with_all, color="#0072B2", marker="o", ms=3, label="with injections" if injected else "")
    if found.without != found.with_all:
        axes.plot(layers, found.without, color="#D55E00", marker="o", ms=3, ls="--", label="without any")
        axes.legend(fontsize=8, frameon=False)
    for layer in injected:
        axes.axvline(layer, color=PALE, lw=0.7, ls=":", zorder=0)
    axes.set(xlabel="layer", ylim=(0, None))
    axes.set_ylabel("attention on visual tokens\nof positions that write", fontsize=8)
    return figure


def map_figure(found: Attention, page: Image.Image) -> Figure:
    """Where on the page the first answer token looks."""
    assert found.grid is not None
    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    pixels = np.asarray(page.convert("RGB"))
    height, width = pixels.shape[:2]
    left.imshow(pixels, interpolation="nearest")
    right.imshow(pixels, interpolation="nearest", alpha=0.45)
    shown = right.imshow(
        found.grid, extent=(0, width, height, 0), cmap="magma", alpha=0.6, interpolation="nearest", vmin=0
    )
    figure.colorbar(shown, ax=right, fraction=0.046, label="attention, mean over heads")
    left.set_title("page", fontsize=9, color=PALE)
    right.set_title(f"first answer token, layer {found.layer}", fontsize=9, color=PALE)
    for axes in (left, right):
        axes.axis("off")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
