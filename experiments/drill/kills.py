"""Fifty times kill -9 at a random moment of training, each gone on with; the end must be the undisturbed run's.

    python experiments/drill/kills.py

A life is killed while it starts (one in ten), while a checkpoint is being written (four in ten), or a moment after a
step. Half of the kills end the run alone, and its workers must go by themselves; half end the workers too. After each
kill the newest checkpoint is read to the last byte. At the end: every tensor of the last checkpoint, weights and
optimiser, equal to the last bit; every micro-batch dealt once in the lines that count, with the undisturbed run's
samples and loss; and what was trained twice, because its checkpoint did not live, was the same both times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from drilling import ENVIRONMENT, ROOT, arguments, markdown, report, small_run
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from deepstack_pl.training.checkpoints import all_of, newest

KILLS, STEPS, SEED = 50, 700, 20
PATIENCE = 120.0  # seconds for what must come


def workers_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def being_written(folder: Path) -> bool:
    return any(".tmp-" in path.name and path.name.startswith("step-") for path in folder.glob("checkpoints/*"))


def wait(process: subprocess.Popen[bytes], until: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not until():
        if process.poll() is not None:
            raise SystemExit(f"The run ended by itself with {process.returncode}, before it was killed.")
        if time.monotonic() > end:
            raise SystemExit("The run does nothing any more.")
        time.sleep(0.001)


def killed(command: list[str], folder: Path, dealt: Path, when: str, draw: random.Random) -> dict[str, Any]:
    """One life and its end."""
    already = len(lines_of(dealt))
    nowhere: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **nowhere)
    later = 0.0
    if when == "starting":
        later = draw.uniform(0.0, 12.0)
    else:
        grown = dealt.stat().st_size if dealt.exists() else 0
        wait(process, lambda: dealt.exists() and dealt.stat().st_size > grown)
        if when == "saving":
            time.sleep(draw.uniform(0.0, 3.0))
            wait(process, lambda: being_written(folder))
            later = draw.uniform(0.0, 0.05)
        else:
            later = draw.uniform(0.0, 6.0)
    time.sleep(later)
    workers = workers_of(process.pid)
    alone = draw.random() < 0.5
    (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()
    saving = being_written(folder)
    end = time.monotonic() + 30
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    if left:
        raise SystemExit(f"Workers {left} outlive a killed run by 30 seconds.")
    found, passed = newest(folder / "checkpoints", deep=True)
    if passed:
        raise SystemExit(f"A kill left a damaged checkpoint in its place: {passed}")
    lines = lines_of(dealt)
    return {
        "when": when,
        "alone": alone,
        "half a checkpoint left": saving,
        "micro-batches": len(lines) - already,
        "reached step": lines[-1]["at"][0] if lines else 0,
        "checkpoint": found.step if found else 0,
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds."""
    checkpoint = all_of(folder / "checkpoints")[0].folder
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


def counted(lines: list[dict[str, Any]]) -> tuple[dict[tuple[int, ...], tuple[Any, ...]], int]:
    """What was dealt in each micro-batch, and how many were trained more than once.

    Raises:
        SystemExit: one differed the second time.
    """
    found: dict[tuple[int, ...], tuple[Any, ...]] = {}
    twice = 0
    for line in lines:
        at, what = tuple(line["at"]), (tuple(line["keys"]), line["loss"])
        twice += at in found
        if found.setdefault(at, what) != what:
            raise SystemExit(f"Step {at[0]}, micro-batch {at[1]} was another one when it was trained again.")
    return found, twice


def finished(command: list[str]) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def main() -> int:
    args = arguments(__doc__)
    kills, steps = (3, 60) if args.quick else (KILLS, STEPS)
    draw = random.Random(SEED)
    seen: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)

        def begun(which: str) -> list[str]:
            return small_run(
                place / which, place / "data", "data.fine_print.train_pages=256", f"trainer.max_steps={steps}",
                "callbacks.checkpoint.every_steps=2", "evaluation=final",
                "+callbacks.dealt._target_=dealt.Dealt", f"+callbacks.dealt.file={place / which}.jsonl",
            )  # fmt: skip

        finished(begun("whole"))
        folder, dealt = place / "killed", place / "killed.jsonl"
        on = [sys.executable, str(ROOT / "train.py"), f"ckpt_path={folder}"]
        for number in range(kills):
            when = draw.choices(("starting", "saving", "training"), (1, 4, 5))[0] if number else "saving"
            command = on if all_of(folder / "checkpoints") else begun("killed")
            seen.append(killed(command, folder, dealt, when, draw))
            print(f"{number + 1} of {kills}: {seen[-1]}", file=sys.stderr, flush=True)
        finished(on)
        whole, again = lines_of(place / "whole.jsonl"), lines_of(dealt)
        expected, _ = counted(whole)
        found, twice = counted(again)
        weights = [tensors_of(place / which) for which in ("whole", "killed")]
        differing = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
        results = [json.loads((place / which / "results.json").read_text()) for which in ("whole", "killed")]
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    lost = [at for at in expected if at not in found]
    other = [at for at in expected if at in found and found[at] != expected[at]]
    ways = Counter(each["when"] for each in seen)
    rows = [
        ["kills", ", ".join(f"{count} {way}" for way, count in ways.items())],
        ["of these, the run alone", sum(each["alone"] for each in seen)],
        ["left half a checkpoint behind", sum(each["half a checkpoint left"] for each in seen)],
        ["left a checkpoint that could not be read", 0],
        ["micro-batches of the undisturbed run", f"{len(expected):,}"],
        ["lost, or dealt to another step", f"{len(lost)}, {len(other)}"],
        ["beyond them", len(found.keys() - expected.keys())],
        ["trained again after a kill, the same to the last bit", f"{twice:,}"],
        ["tensors of the last checkpoint, weights and optimiser", f"{len(weights[0]):,}"],
        ["that differ in any bit", len(differing)],
        ["data, steps and metrics told in results.json", "equal" if _same(*results) else "DIFFER"],
        ["checkpoints and other names at the end", ", ".join(left)],
    ]
    good = not (lost or other or differing or found.keys() - expected.keys()) and _same(*results)
    good = good and weights[0].keys() == weights[1].keys()
    parts = [
        f"{kills} lives of one run of {steps} steps (packed rows, two workers, dropout, a checkpoint every 2 steps), "
        f"moments drawn with seed {SEED}.",
        markdown(["", ""], rows),
        "The end is the undisturbed run's to the last bit." if good else "**The end is not the undisturbed run's.**",
    ]
    report("kills", "Kills", parts, seen, args)
    return 0 if good else 1


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("data", "steps", "status", "metrics"))


if __name__ == "__main__":
    sys.exit(main())
