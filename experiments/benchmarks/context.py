"""Context for resolution: what five times the visual tokens cost, stacked and side by side.

A training step (forward and backward of tower, projector and LLM) on the same images and texts: `baseline` sees one
view, `deepstack_l` and `long_context` the same five, the one under the global view's tokens, the other beside them.
Time is of whole processes' CPU seconds in turns; memory the most that one step adds to a process of its own.

    python experiments/benchmarks/context.py

also draws docs/images/context_for_resolution.png.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import statistics
import sys
import time
from pathlib import Path

import torch
from harness import arguments, in_turns, markdown, peak_during, peak_of, ratio, report
from sizes import BASELINE, LONG, STACKED, batch_of, learn, llm_of, model_of, sample_of, vision_of

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

PLANS = {"baseline": BASELINE, "deepstack_l": STACKED, "long_context": LONG}
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "context_for_resolution.png"
ROWS, TEXT = 4, 48


def made(name: str, *, quick: bool) -> tuple[DeepStackForConditionalGeneration, MultimodalBatch]:
    llm = llm_of(layers=6, width=64, heads=2) if quick else llm_of()
    model = model_of(PLANS[name], llm, vision_of(patches=4 if quick else 12))
    return model, batch_of(model, [sample_of(model, seed, TEXT) for seed in range(ROWS)])


def draw(rows: list[tuple[str, int, float, float]], file: Path) -> None:
    """Time and memory, each a multiple of the baseline's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    for place, (title, column) in enumerate((("time of a step", 2), ("memory of a step", 3))):
        axes = figure.add_subplot(1, 2, place + 1)
        values = [row[column] for row in rows]
        bars = axes.barh([f"{row[0]}\n{row[1]} visual tokens in the text" for row in rows], values, color="#4C72B0")
        axes.bar_label(bars, [f"{value:.2f}x" for value in values], padding=3)
        axes.invert_yaxis()
        axes.set_title(f"{title}, baseline = 1", fontsize=10)
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
        if place:
            axes.set_yticklabels([])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    args = arguments(__doc__, repetitions=3)
    torch.set_num_threads(1)
    candidates = {name: made(name, quick=args.quick) for name in PLANS}
    times = in_turns(
        {name: lambda it=it: learn(*it) for name, it in candidates.items()}, args.repetitions, time.process_time
    )
    words = ["--quick"] if args.quick else []
    memory = {name: peak_of(__file__, "peak", name, *words) for name in PLANS}
    per_view = candidates["baseline"][0].config.typed_vision().patches_per_side ** 2
    rows, drawn = [], []
    for name, (_, batch) in candidates.items():
        visual = int((batch.token_index >= 0).sum()) // ROWS
        seconds = statistics.median(times[name])
        turns = zip(times[name], times["baseline"], strict=True)
        slower = statistics.median(own / base for own, base in turns)
        drawn.append((name, visual, slower, memory[name] / memory["baseline"]))
        rows.append(
            [
                name,
                len(batch.views) * per_view // ROWS,
                visual,
                f"{seconds:.3f}",
                ratio(times[name], times["baseline"]),
                f"{memory[name] / 2**20:.0f}",
                f"{memory[name] / memory['baseline']:.2f}",
            ]
        )
    head = ["model", "visual tokens seen", "in the text", "median s", "times baseline's", "MiB", "times baseline's"]
    size = sum(p.numel() for p in candidates["baseline"][0].parameters()) / 1e6
    about = f"{size:.1f} million parameters, {ROWS} rows with an image and {TEXT} tokens of text each."
    draw(drawn, args.out / "context_for_resolution.png" if args.quick else PICTURE)
    report("context", "Context for resolution", [about, markdown(head, rows)], {"times": times, "bytes": memory}, args)


def peak(name: str, *, quick: bool) -> None:
    model, batch = made(name, quick=quick)
    print(peak_during(lambda: learn(model, batch)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], quick="--quick" in sys.argv)
    else:
        main()
