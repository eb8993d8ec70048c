"""What the benchmarks share: turns, ratios, tables. A ratio is of one run, in which the candidates took turns."""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers")


def arguments(doc: str, repetitions: int) -> argparse.Namespace:
    """``--repetitions``, ``--quick`` and ``--out``, as every benchmark takes them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help="turns of every candidate")
    parser.add_argument("--quick", action="store_true", help="small sizes and one turn: whether it runs, no figures")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="where the table and the times go")
    found = parser.parse_args()
    if found.quick:
        found.repetitions = 1
    return found


def in_turns(
    candidates: Mapping[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each candidate; ``warm_up`` turns before are not counted.

    ``clock``: `time.process_time` where one thread computes, which leaves out what else the machine does.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(-warm_up, repetitions):
        for name in names if turn % 2 else names[::-1]:  # who is first changes
            gc.collect()
            start = clock()
            candidates[name]()
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    """The median over turns of ``of / to``, with the least and the most."""
    each = [one / other for one, other in zip(of, to, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> str:
    """Processor, threads, packages, commit."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads; {versions}, Python "
        f"{platform.python_version()}; after commit {commit()}"
    )


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "none"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def report(name: str, title: str, parts: Sequence[str], raw: Any, args: argparse.Namespace) -> None:
    """Print it, and write it to ``NAME.md``, with every time in ``NAME.json``."""
    quick = " --quick" if args.quick else ""
    command = f"python experiments/benchmarks/{name}.py --repetitions {args.repetitions}{quick}"
    text = "\n\n".join([f"# {title}", *parts, f"Command: `{command}`. {machine()}. Single times: `{name}.json`."])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(text + "\n")
    (args.out / f"{name}.json").write_text(json.dumps(raw) + "\n")
    print(text)


def peak_of(script: str, *words: str) -> float:
    """Bytes that ``python script words`` takes beyond what it held when it said `ready`, in a process of its own."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.split()[-1])


def peak_during(work: Callable[[], Any]) -> float:
    """Bytes of memory that ``work`` takes at most beyond what this process holds; Linux says it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
