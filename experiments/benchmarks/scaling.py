"""Time of a training step against sequence length, tiles, batch and depth; and one process against two.

One value changes at a time; the rest is DeepStack-L with four tiles of 144 tokens, two rows of 128 text tokens, twelve
layers. One thread, CPU time, in turns. One and two processes are whole runs of ``train.py`` (``strategy=ddp`` over
gloo, a thread each), of which the tokens a second are read: on a machine with fewer than two free cores the second
process has nowhere to run.

    python experiments/benchmarks/scaling.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import arguments, in_turns, markdown, ratio, report
from sizes import STACKED, batch_of, learn, llm_of, model_of, sample_of, vision_of

ROOT = Path(__file__).parents[2]
AXES: dict[str, list[int]] = {
    "text": [64, 128, 256, 512],
    "tiles": [2, 4, 9],
    "rows": [1, 2, 4],
    "layers": [6, 12, 24],
}
SAID = {
    "text": "Text tokens a row",
    "tiles": "Tiles an image at most",
    "rows": "Rows a batch",
    "layers": "Decoder layers",
}


def step(*, text: int = 128, tiles: int = 4, rows: int = 2, layers: int = 12, quick: bool = False) -> Callable[[], Any]:
    plan = replace(STACKED, tiles=tiles, groups=tiles)
    llm = llm_of(layers=layers, width=64, heads=2) if quick else llm_of(layers=layers)
    model = model_of(plan, llm, vision_of(patches=6 if quick else 12))
    batch = batch_of(model, [sample_of(model, seed, text) for seed in range(rows)])
    return lambda: learn(model, batch)


def processes(steps: int, repetitions: int) -> dict[str, list[float]]:
    """Tokens a second of one process and of two, in turns."""
    found: dict[str, list[float]] = {"1 process": [], "2 processes": []}
    words = ["trainer.accelerator=cpu", f"trainer.max_steps={steps}", "data.batch_size=16", "evaluation=final"]
    words += [
        "evaluation.final_samples=2",
        "data.fine_print.train_pages=256",
        "~callbacks.checkpoint",
        "data.workers=0",
    ]
    for _ in range(repetitions):
        for name, more in (("1 process", []), ("2 processes", ["strategy=ddp", "trainer.devices=2"])):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "train.py", *words, *more, f"hydra.run.dir={folder}/run"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                found[name].append(json.loads(Path(folder, "run", "results.json").read_text())["tokens_per_second"])
    return found


def main() -> None:
    args = arguments(__doc__, repetitions=2)
    torch.set_num_threads(1)
    raw: dict[str, Any] = {}
    parts = []
    for axis, values in AXES.items():
        values = values[:2] if args.quick else values
        steps = {str(value): step(**{axis: value}, quick=args.quick) for value in values}
        times = in_turns(steps, args.repetitions, time.process_time)
        first = times[str(values[0])]
        rows = [[n, f"{statistics.median(own):.3f}", ratio(own, first)] for n, own in times.items()]
        parts.append(f"## {SAID[axis]}\n\n" + markdown([axis, "median s", f"times that of {values[0]}"], rows))
        raw[axis] = times
    speeds = processes(4 if args.quick else 25, args.repetitions)
    one = speeds["1 process"]
    rows = [[n, f"{statistics.median(own):,.0f}", ratio(own, one)] for n, own in speeds.items()]
    parts.append("## Processes\n\n" + markdown(["", "tokens/s", "times one process's"], rows))
    report("scaling", "Scale curves", parts, raw | {"processes": speeds}, args)


if __name__ == "__main__":
    main()
