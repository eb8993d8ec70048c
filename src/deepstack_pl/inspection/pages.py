"""Pictures of answered pages: what was asked, seen, said and right."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from deepstack_pl.inspection.plots import INK, PALE, RIGHT, WRONG


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
        axes.set_title(f"{name}, {pixels.shape[1]} x {pixels.shape[0]}", fontsize=9, color=PALE)
        axes.axis("off")
    figure.text(0.03, 0.935, title, fontsize=11, weight="bold", color=INK)
    figure.text(0.97, 0.935, f"{sum(correct)} of {len(facts)} right", fontsize=11, weight="bold", color=INK, ha="right")
    axes = figure.add_axes((0.055 + 0.255 * len(pictures), 0.05, 0.93 - 0.255 * len(pictures), 0.82))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    axes.text(0, 1, _shorten(prompt, 150), fontsize=9, color=PALE, va="top", wrap=True)
    words = prediction.split() if len(facts) > 1 else [prediction]
    _answer(axes, words, facts, correct, columns)
    if len(words) > len(facts):
        axes.text(0, 0, _shorten("and then: " + " ".join(words[len(facts) :]), 80), fontsize=8, color=WRONG)
    if prediction.strip() != answer.strip() and len(facts) > 1 and all(correct):
        axes.text(1, 0, "all facts right, answer not exact", fontsize=8, color=PALE, ha="right")
    return figure


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
        colour = RIGHT if right else WRONG
        axes.text(x, y, _shorten(said, room), fontsize=10, family="monospace", color=colour, weight="bold", va="top")
        if not right:
            below = y - min(0.055, 0.45 * pitch)
            axes.text(x, below, _shorten(fact, room + 4), fontsize=7, family="monospace", color=PALE, va="top")


def _shorten(text: str, room: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= room else flat[: room - 1] + "…"
