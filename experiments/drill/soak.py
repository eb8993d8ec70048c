"""An hour of training with workers, a checkpoint a minute and two restarts: do memory, files and threads stay?

    python experiments/drill/soak.py

Each of three lives of the run is ended by SIGTERM (the last one too) and the next goes on with its checkpoint. Every
five seconds the memory (proportional, without pages of files), the open files and the threads of the run and its
workers are read. The first quarter of a life is warm-up; the medians of the second and of the last are compared.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drilling import ENVIRONMENT, ROOT, arguments, markdown, report, small_run

from deepstack_pl.training.checkpoints import all_of

LIVES, MINUTES = 3, 20
BOUND = 0.02  # of memory
_OWN = ("Pss_Anon:", "Pss_Shmem:")  # pages of files are left out: other programs share them, or cease to


def looked(pid: int) -> dict[str, int] | None:
    """Bytes, open files and threads of ``pid`` and everything below it; None while a process comes or goes."""
    found = {"bytes": 0, "files": 0, "threads": 0, "processes": 0}
    left = [pid]
    try:
        while left:
            each = left.pop()
            place = Path(f"/proc/{each}")
            rollup = (place / "smaps_rollup").read_text().splitlines()
            found["bytes"] += 1024 * sum(int(line.split()[1]) for line in rollup if line.startswith(_OWN))
            found["files"] += len(list((place / "fd").iterdir()))
            tasks = list((place / "task").iterdir())
            found["threads"] += len(tasks)
            found["processes"] += 1
            left += [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return None
    return found


def steps_of(folder: Path) -> int:
    return max((checkpoint.step for checkpoint in all_of(folder / "checkpoints")), default=0)


def live(command: list[str], folder: Path, seconds: float, step: float) -> list[dict[str, Any]]:
    """What was seen of one life, from its first checkpoint on."""
    before = steps_of(folder)
    with (folder.parent / "said.txt").open("ab") as said:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=said)
    seen: list[dict[str, Any]] = []
    begun = None
    while begun is None or time.monotonic() < begun + seconds:
        time.sleep(step)
        if process.poll() is not None:
            raise SystemExit(
                f"The run ended by itself with {process.returncode}:\n{Path(said.name).read_text()[-3000:]}"
            )
        if begun is None and steps_of(folder) > before:
            begun = time.monotonic()
        if begun is not None and (found := looked(process.pid)):
            seen.append({"second": round(time.monotonic() - begun, 1), "step": steps_of(folder), **found})
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=120)
    if status != 143:
        raise SystemExit(f"SIGTERM ended the run with {status}, not 143:\n{Path(said.name).read_text()[-3000:]}")
    return seen


def quarters(seen: list[dict[str, Any]], name: str, seconds: float) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    of = [[at[name] for at in seen if begin <= at["second"] / seconds < end] for begin, end in ((0.25, 0.5), (0.75, 2))]
    return statistics.median(of[0]), statistics.median(of[1])


def main() -> int:
    args = arguments(__doc__)
    seconds, step, every = (20.0, 0.5, 10) if args.quick else (60.0 * MINUTES, 5.0, 200)
    lives: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        first = small_run(
            folder, Path(place) / "data", "data.fine_print.train_pages=1024", "trainer.max_steps=100000",
            f"callbacks.checkpoint.every_steps={every}", f"evaluation.every_steps={2 * every}",
        )  # fmt: skip
        on = [sys.executable, str(ROOT / "train.py"), f"ckpt_path={folder}"]
        for number in range(LIVES):
            lives.append(live(on if number else first, folder, seconds, step))
            print(f"life {number + 1} of {LIVES} ended at step {steps_of(folder):,}", file=sys.stderr, flush=True)
        status = json.loads((folder / "results.json").read_text())["status"]
    rows, worst = [], 0.0
    for number, seen in enumerate(lives, 1):
        memory, files, threads = (quarters(seen, name, seconds) for name in ("bytes", "files", "threads"))
        change = memory[1] / memory[0] - 1
        worst = max(worst, change)
        rows.append(
            [
                number,
                f"{seen[-1]['step']:,}",
                f"{memory[0] / 2**20:.1f}",
                f"{memory[1] / 2**20:.1f}",
                f"{change:+.2%}",
                f"{files[0]:.0f}, {files[1]:.0f}",
                f"{threads[0]:.0f}, {threads[1]:.0f}",
            ]
        )
    head = ["life", "last step seen", "MiB, second quarter", "MiB, last quarter", "change", "open files", "threads"]
    flat = worst <= BOUND and all(row[-1].split(", ")[0] == row[-1].split(", ")[1] for row in rows)
    flat = flat and all(row[-2].split(", ")[0] == row[-2].split(", ")[1] for row in rows)
    parts = [
        f"{LIVES} lives of {seconds / 60:.0f} minutes after their first checkpoint, two workers, a checkpoint every "
        f"{every} steps, evaluation every {2 * every}; at last the run is {status!r}.",
        markdown(head, rows),
        f"Memory grew by {worst:+.2%} at most (bound {BOUND:.0%}); files and threads "
        f"{'stayed' if flat else 'did not all stay, or memory grew beyond the bound'}.",
    ]
    report("soak", "Soak", parts, lives, args)
    return 0 if flat or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
