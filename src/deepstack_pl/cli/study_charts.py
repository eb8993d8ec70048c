"""A study as figures: accuracy by arm or over what was swept, learning curves, quality against cost."""

from collections.abc import Sequence
from io import StringIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from deepstack_pl.cli.study import COSTS, Arm, Study
from deepstack_pl.inspection.plots import INK, PALE, PALETTE

# Figure 3 has no numbers in the text. These were read off its curves by third parties, by eye; two readings of (b)
# differ by up to a point. Averages over seven benchmarks, Phi-3-mini with 32 layers.
READINGS: dict[str, dict[float, float]] = {
    "model.start_layer": {0: 49.5, 1: 49.5, 2: 49.4, 4: 49.2, 8: 48.2, 16: 44.2, 24: 38.0},
    "model.interval": {0: 49.0, 1: 50.8, 2: 51.1, 3: 50.9, 4: 50.8, 5: 50.4},
    "model.groups": {0: 49.2, 2: 50.3, 4: 51.0, 6: 50.0, 9: 49.5},
}


def figures(study: Study) -> dict[str, Figure]:
    """By title, what there is to show of ``study``."""
    found = {}
    if study.swept is not None:
        found[f"Accuracy over {study.swept}"] = over(study, study.swept)
    elif len(study.arms) > 1:
        found["Accuracy by arm"] = by_arm(study)
    if any(run.get("curve") for arm in study.arms for run in arm.runs.values()):
        found["While training"] = learning(study)
    if len(study.arms) > 1:
        found["Quality against cost"] = pareto(study)
    return found


def svg(figure: Figure) -> str:
    """As text for a page, the same for the same figure."""
    buffer = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def over(study: Study, key: str) -> Figure:
    """Accuracy over the one value that arms differ in; points are seeds, bands intervals. Beside it what was read off
    the paper's figure.
    """
    readings = READINGS.get(key)
    figure, panels = _panels(2 if readings else 1)
    arms = study.arms
    at = [float(arm.words[key]) for arm in arms]
    for number, kind in enumerate(study.kinds):
        colour = PALETTE[number]
        bands = [arm.interval(kind) for arm in arms]
        panels[0].plot(at, [arm.accuracy(kind) for arm in arms], color=colour, marker="o", label=f"{kind} facts")
        panels[0].fill_between(at, [b[0] for b in bands], [b[1] for b in bands], color=colour, alpha=0.15, lw=0)
        for place, arm in zip(at, arms, strict=True) if len(arms[0].runs) > 1 else ():
            each = [run["metrics"][kind]["accuracy"] for run in arm.runs.values()]
            panels[0].scatter([place] * len(each), each, s=14, color=colour, edgecolor="white", linewidth=0.5, zorder=3)
    panels[0].set(xlabel=key, ylabel="accuracy", ylim=(-0.02, 1.05), title="found here", xticks=at)
    _legend(panels[0])
    if readings:
        panels[1].plot(list(readings), list(readings.values()), color=PALE, marker="s", ls="--")
        panels[1].set(xlabel=key, ylabel="average of seven benchmarks", title="the paper's figure 3, Phi-3 (32 layers)")
        note = "third-party readings by eye, unverified"
        panels[1].text(0.03, 0.04, note, transform=panels[1].transAxes, fontsize=8, color=INK)
    return figure


def by_arm(study: Study) -> Figure:
    """A dot an arm with its interval, and its seeds beside it, for each kind."""
    figure, panels = _panels(len(study.kinds), height=1.0 + 0.42 * len(study.arms))
    for axes, kind in zip(panels, study.kinds, strict=True):
        for place, arm in enumerate(study.arms):
            low, high = arm.interval(kind)
            colour = _colour(study, arm)
            axes.plot([low, high], [place, place], color=colour, lw=3, alpha=0.45, solid_capstyle="round")
            axes.plot(arm.accuracy(kind), place, "o", color=colour)
            each = [run["metrics"][kind]["accuracy"] for run in arm.runs.values()]
            if len(each) > 1:
                axes.scatter(each, [place + 0.22] * len(each), s=9, color=colour)
        axes.set(xlim=(-0.02, 1.05), xlabel=f"accuracy on {kind} facts")
        axes.set_yticks(range(len(study.arms)), [arm.name for arm in study.arms], fontsize=8)
        axes.invert_yaxis()
    return figure


def learning(study: Study) -> Figure:
    """Accuracy at the validations of training; a thin line a seed, a thick one their mean."""
    figure, panels = _panels(len(study.kinds))
    for axes, kind in zip(panels, study.kinds, strict=True):
        for arm in study.arms:
            curves = [[(p["step"], p[kind]) for p in run.get("curve", []) if kind in p] for run in arm.runs.values()]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            colour = _colour(study, arm)
            for curve in curves if len(curves) > 1 else []:
                axes.plot(*zip(*curve, strict=True), color=colour, lw=0.7, alpha=0.5)
            steps = [step for step, _ in curves[0]]
            if all([step for step, _ in curve] == steps for curve in curves):
                mean = [sum(values) / len(values) for values in zip(*([v for _, v in c] for c in curves), strict=True)]
                axes.plot(steps, mean, color=colour, lw=2, label=arm.name)
        axes.set(xlabel="step", ylabel=f"accuracy on {kind} facts", ylim=(-0.02, 1.05))
    _legend(panels[-1])
    return figure


def pareto(study: Study) -> Figure:
    """Of the kind in which arms are furthest apart: accuracy against each cost; the line joins arms that none beats in
    both.
    """
    kind = max(
        study.kinds, key=lambda k: max(a.accuracy(k) for a in study.arms) - min(a.accuracy(k) for a in study.arms)
    )
    known = [name for name in COSTS if all(arm.cost(name) is not None for arm in study.arms)]
    figure, panels = _panels(len(known), width=3.1)
    for axes, name in zip(panels, known, strict=True):
        points = [(arm.cost(name) or 0.0, arm.accuracy(kind)) for arm in study.arms]
        for arm, point in zip(study.arms, points, strict=True):
            axes.plot(*point, "o", color=_colour(study, arm), label=arm.name)
        best = front(points, more_is_worse=COSTS[name].more_is_worse)
        axes.plot(*zip(*best, strict=True), color=PALE, lw=1, zorder=0)
        axes.set(xlabel=COSTS[name].label, ylim=(-0.02, 1.05))
    panels[0].set_ylabel(f"accuracy on {kind} facts")
    _legend(panels[-1])
    return figure


def front(points: Sequence[tuple[float, float]], *, more_is_worse: bool) -> list[tuple[float, float]]:
    """The points that no other beats in cost and quality, from cheap to dear."""
    found: list[tuple[float, float]] = []
    for cost, quality in sorted(set(points), key=lambda p: (p[0] if more_is_worse else -p[0], -p[1])):
        if not found or quality > found[-1][1]:
            found.append((cost, quality))
    return found


def _panels(count: int, *, width: float = 4.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure, panels


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _colour(study: Study, arm: Arm) -> str:
    return PALETTE[study.arms.index(arm) % len(PALETTE)]
