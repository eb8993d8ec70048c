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
_QUARTERS = ((0.25, 0.5), (0.75, 2.0))
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


def quarters(seen: list[dict[str, Any]], name: str, seconds: float) -> tuple[list[int], list[int]]:
    """What was seen in the second and in the last quarter."""
    second, last = ([at[name] for at in seen if begin <= at["second"] / seconds < end] for begin, end in _QUARTERS)
    return second, last


def told(lives: list[list[dict[str, Any]]], seconds: float) -> tuple[str, str, bool]:
    """The table, a sentence, and whether all stayed.

    Batches on their way from a worker are open files that come and go, so the fewest of a quarter are compared.
    """
    rows, growths, stayed = [], [], True
    for number, seen in enumerate(lives, 1):
        memory = [statistics.median(each) for each in quarters(seen, "bytes", seconds)]
        files, threads = ([min(each) for each in quarters(seen, name, seconds)] for name in ("files", "threads"))
        growths.append(memory[1] / memory[0] - 1)
        stayed &= files[1] <= files[0] and threads[1] <= threads[0]
        rows.append(
            [
                number,
                f"{seen[-1]['step']:,}",
                *(f"{each / 2**20:.1f}" for each in memory),
                f"{growths[-1]:+.2%}",
                f"{files[0]}, {files[1]}",
                f"{threads[0]}, {threads[1]}",
            ]
        )
    head = ["life", "last step seen", "MiB, second quarter", "MiB, last quarter", "change", "fewest files", "threads"]
    flat = stayed and max(growths) <= BOUND
    sentence = (
        f"Memory grew by {max(growths):+.2%} at most (bound {BOUND:.0%}); files and threads "
        f"{'stayed' if stayed else '**did not stay**'}."
    )
    return markdown(head, rows), sentence, flat


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
    table, sentence, flat = told(lives, seconds)
    parts = [
        f"{LIVES} lives of {seconds / 60:.0f} minutes after their first checkpoint, two workers, a checkpoint every "
        f"{every} steps, evaluation every {2 * every}; at last the run is {status!r}.",
        table,
        sentence,
    ]
    report("soak", "Soak", parts, lives, args)
    return 0 if flat or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
