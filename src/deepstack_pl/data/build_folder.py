"""The folder of a set while it is built: for one build alone, holding nothing else's, and whole or marked."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepstack_pl.data.corpora import SPLITS
from deepstack_pl.data.index import sidecar
from deepstack_pl.data.shard_jobs import RECEIPTS, Job, Written, remove_shard
from deepstack_pl.data.shards import MANIFEST, MARKER, sweep, write_json
from deepstack_pl.data.whole_set import lost_of_set

LEFT_OUT = "left_out.jsonl"


@contextmanager
def folder_of(out: Path, made_of: Mapping[str, Any]) -> Iterator[None]:
    """``out``, for this build alone.

    Raises:
        ValueError: it holds something else, or a set made of something else, or another build writes there.
    """
    receipts = out / RECEIPTS
    told = receipts / "made_of.json"
    if not told.exists():
        ours = [out / name for name in (MANIFEST, LEFT_OUT)] + [out / split / MANIFEST for split in SPLITS]
        foreign = [path for path in ours if path.exists()]
        foreign += [tar for split in SPLITS for tar in (out / split).glob("*.tar")]
        if foreign:
            raise ValueError(f"{foreign[0]} was not made by this command. Choose another out=, or empty {out}.")
    for part in (*SPLITS, RECEIPTS):
        (out / part).mkdir(parents=True, exist_ok=True)
    with (receipts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another build writes here. Wait for it, or choose another out=.") from error
        if told.exists():
            its = json.loads(told.read_bytes())
            differ = [f"{key} {its.get(key)} (now {value})" for key, value in made_of.items() if its.get(key) != value]
            if differ:
                raise ValueError(
                    f"{out} was built otherwise: {', '.join(differ)}. Sets are never mixed: choose another out=, or "
                    "remove this one and build it again."
                )
        else:
            write_json(told, made_of)
        for split in SPLITS:
            sweep(out / split)
            sweep(aside(out) / split)
        yield


def aside(out: Path) -> Path:
    """Where the shards are written that are to replace those of a finished set."""
    return out / RECEIPTS / "aside"


def stands(out: Path) -> bool:
    """Whether ``out`` is a finished set: it stays one until what replaces its shards is written."""
    marked = any((out / split / MARKER).exists() for split in SPLITS)
    try:
        return (out / MANIFEST).is_file() and not marked and not lost_of_set(out)
    except ValueError:  # a manifest is damaged, and is written again
        return False


def mark(out: Path) -> None:
    """From here on until its manifests are written nobody reads ``out``."""
    (out / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        (out / split / MARKER).touch()


def spare(out: Path, jobs: Sequence[Job]) -> list[Path]:
    """Shards that are no longer needed."""
    paths = {job.path for job in jobs}
    return [tar for split in SPLITS for tar in (out / split).glob("*.tar") if tar not in paths]


def move(new: Job, old: Job, written: Written) -> None:
    """Put a shard that was written aside in the place of the old one; its receipt comes last."""
    old.receipt.unlink(missing_ok=True)
    if written.shard is None:
        remove_shard(old.path)
    else:
        os.replace(sidecar(new.path), sidecar(old.path))
        os.replace(new.path, old.path)
    os.replace(new.receipt, old.receipt)


def check_space(out: Path, needed: int) -> None:
    """Refuse a disk that has not room for ``needed`` bytes."""
    free = shutil.disk_usage(out).free
    if needed * 1.02 > free:
        raise ValueError(
            f"{out}: {needed:,} bytes are to be written, but {free:,} are free. Make room, or choose another out=."
        )
