"""``deepstack shards build``: a LLaVA-format corpus into WebDataset shards."""

import os
import sys
from pathlib import Path

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import OnMissing, Source

HELP = "a LLaVA-format corpus into WebDataset shards, with an index beside each and a report of what was left out"
EXAMPLE = "deepstack shards build data=llava665k data.root=DIR missing=skip"
OWN = {
    "out": "folder of the shards; default data.shards, or ROOT/shards/NAME",
    "missing": "error (default): nothing is built if a record cannot be taken; skip: it is left out and listed",
    "processes": "that write shards at once; default: one for each processor, at most 8",
    "shard_mb": "megabytes of a shard, at most; default 384",
    "decode": "true (default): every image is decoded to prove it; false: its header is read",
}


def run(run: RunConfig, own: dict[str, str]) -> int:
    """Build; 1 where records cannot be taken and none may be left out.

    Raises:
        ValueError: an argument, the corpus, or what lies at ``out``.
    """
    missing = own.get("missing", "error")
    if missing not in OnMissing.__members__:
        raise ValueError(f"missing={missing}: use {' or '.join(OnMissing.__members__)}.")
    if own.get("decode", "true") not in ("true", "false"):
        raise ValueError(f"decode={own['decode']}: use true or false.")
    processes = _number(own, "processes", min(8, os.cpu_count() or 1))
    shard_mb = _number(own, "shard_mb", 384)

    from rich.console import Console

    from deepstack_pl.data.build import How, build
    from deepstack_pl.data.build_report import show
    from deepstack_pl.data.corpora import corpus_files
    from deepstack_pl.data.sources import shards_root

    data = run.data
    files = corpus_files(data)
    default = shards_root(data) if data.source is Source.corpus else data.shards or f"{data.root}/shards/{files.name}"
    place = own.get("out", default)
    if not place:
        raise ValueError("out= is empty. Name a folder, or leave it out.")
    if "://" in place:
        raise ValueError(f"out={place}: build into a folder of this machine, and upload it.")
    out = Path(place)
    how = How(
        missing=OnMissing[missing],
        processes=processes,
        max_bytes=shard_mb * 10**6,
        decode=own.get("decode", "true") == "true",
        val_samples=data.val_samples,
    )
    report = build(files, out, how)
    show(report, files.name, data.expected, Console())
    if not report.whole:
        more = "; images are decoded when these are mended" if report.survey.left_out else ""
        says = f"{len(report.left_out):,} records cannot be taken{more}: {out} is not built."
        print(f"{says} Mend or fetch them, or build without them: missing=skip", file=sys.stderr)
        return 1
    if data.source is not Source.corpus:
        words = f"data=shards data.root={out}"
    else:
        words = f"data={data.name} data.root={data.root}"
        words += "" if str(out) == default and not data.shards else f" data.shards={out}"
    print(f"Train on them: python train.py {words}")
    return 0


def _number(own: dict[str, str], name: str, default: int) -> int:
    text = own.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text}: use a whole number from 1 on.")
    return int(text)
