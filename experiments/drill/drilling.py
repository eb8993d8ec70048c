"""What the drills share: a small run that is typed as a user types it, and where figures go."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "benchmarks"))

from harness import commit, machine, markdown  # noqa: E402 - it lies there

__all__ = ["ENVIRONMENT", "HERE", "ROOT", "arguments", "commit", "markdown", "parser_of", "report", "small_run"]

# PYTHONPATH: the witness (dealt.py) is a callback that the run's config names.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
}


def small_run(folder: Path, data: Path, *more: str) -> list[str]:
    """``python train.py`` on packed rows of WebDataset shards, two workers, dropout, two micro-batches a step."""
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"hydra.run.dir={folder}",
        f"data.root={data}",
        "data.fine_print.val_pages=8",
        "data.batching=packed",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.workers=2",
        "llm.max_length=192",
        "llm.architecture.num_hidden_layers=5",
        "+llm.architecture.attention_dropout=0.1",
        "evaluation.samples=2",
        "evaluation.final_samples=2",
        "callbacks.split.every_steps=1000000",
        *more,
    ]


def parser_of(doc: str) -> argparse.ArgumentParser:
    """``--quick`` and ``--out``, as every drill takes them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs; its figures say nothing")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="where the figures go")
    return parser


def arguments(doc: str) -> argparse.Namespace:
    return parser_of(doc).parse_args()


def report(name: str, title: str, parts: Sequence[str], raw: Any, args: argparse.Namespace) -> None:
    """Print it, and write it to ``NAME.md``, with everything that was seen in ``NAME.json``."""
    command = f"python experiments/drill/{name}.py{' --quick' if args.quick else ''}"
    text = "\n\n".join([f"# {title}", *parts, f"Command: `{command}`. {machine()}. All that was seen: `{name}.json`."])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(text + "\n")
    (args.out / f"{name}.json").write_text(json.dumps(raw) + "\n")
    print(text)
