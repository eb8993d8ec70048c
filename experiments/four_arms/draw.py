"""Draw a four-arm sweep: ``python experiments/four_arms/draw.py outputs/sweeps/SWEEP`` writes fine.png here.

Left: accuracy on fine facts at the validations during training, from the arms' TensorBoard events. Right: the last
evaluation with its 95% intervals, from sweep.json.
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLOURS = {"baseline": "#777777", "deepstack_l": "#0072b2", "deepstack_v": "#009e73", "long_context": "#d55e00"}


def curve(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and accuracy on fine facts of one arm."""
    events = EventAccumulator(str(folder))
    events.Reload()
    points = events.Scalars("val/fine/accuracy")
    return [p.step for p in points], [p.value for p in points]


def draw(sweep: Path) -> Figure:
    arms = json.loads((sweep / "sweep.json").read_text())["arms"]
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for place, arm in enumerate(arms):
        name, fine = arm["plan"]["name"], arm["metrics"]["fine"]
        left.plot(*curve(sweep / arm["name"]), marker="o", color=COLOURS[name], label=name)
        low, high = fine["ci95"]
        error = [[fine["accuracy"] - low], [high - fine["accuracy"]]]
        right.barh(place, fine["accuracy"], color=COLOURS[name], xerr=error, capsize=3)
    for axes in (left, right):
        (axes.axhline if axes is left else axes.axvline)(0.25, color="black", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="accuracy on fine facts", ylim=(0, 1.05), title="during training (128 samples)")
    labels = [f"{arm['plan']['name']}\n{arm['tokens_per_image']['context']} tokens of context" for arm in arms]
    right.set_yticks(range(len(arms)), labels, fontsize=8)
    right.set(xlim=(0, 1.05), xlabel="accuracy on fine facts", title="at the end, 95% intervals")
    right.invert_yaxis()
    left.legend(fontsize=8)
    left.text(0.99, 0.27, "chance", fontsize=8, ha="right", transform=left.get_yaxis_transform())
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(Path(__file__).parent / "fine.png", dpi=110)
