"""A LLaVA-format corpus into WebDataset shards: looked through first, then written by several processes.

``out/train`` and ``out/val`` hold the shards with their indexes and manifests, ``out/manifest.json`` says what they
were made of, ``out/left_out.jsonl`` has a line for every record that was not taken. A folder is marked unfinished from
the first shard until its manifest is written; building again keeps the shards that are finished.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepstack_pl.data.config import OnMissing
from deepstack_pl.data.corpora import SPLITS, CorpusFiles, LeftOut, Survey, survey
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shard_jobs import RECEIPTS, Job, Stopped, Written, finished, plan, remove_shard, write_shard
from deepstack_pl.data.shards import MANIFEST, MARKER, ShardInfo, sweep, write_json, write_manifest

BUILD_VERSION = 1  # of what is written from the same files
LEFT_OUT = "left_out.jsonl"
MAX_BYTES = 384 * 10**6


@dataclass(frozen=True, slots=True)
class How:
    """How a corpus is built; ``decode`` opens every image in full."""

    missing: OnMissing = OnMissing.error
    processes: int = 1
    max_bytes: int = MAX_BYTES
    decode: bool = True
    val_samples: int = 256

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}: use 1 or more.")
        if self.max_bytes < 10**5:
            raise ValueError(f"shards of {self.max_bytes} bytes: use 0.1 MB or more (shard_mb=).")


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a corpus.

    Attributes:
        whole: whether ``out`` is a finished set; it is not where records cannot be taken and none may be left out.
        shards: by split.
        kept: shards that were there already.
        taken: records written, by source.
    """

    out: Path
    whole: bool
    survey: Survey
    left_out: list[LeftOut]
    shards: dict[str, list[ShardInfo]]
    kept: int
    taken: Counter[str]


def build(files: CorpusFiles, out: Path, how: How) -> Report:
    """Build the shards of a corpus into ``out``.

    Raises:
        ValueError: the JSON file is none, nothing can be taken, ``out`` holds something else, or the disk is too small.
        KeyboardInterrupt: stopped; what is finished is kept.
    """
    before = _state(files.json)
    seen = survey(files, how.val_samples)
    if seen.left_out and how.missing is OnMissing.error:
        return Report(out, False, seen, seen.left_out, {}, 0, Counter())
    for split, found in seen.found.items():
        if not found:
            raise ValueError(
                f"{files.json}: no record can be taken for {split} ({_by_reason(seen.left_out)}). Fetch what is "
                f"missing, or correct data.images={files.images}."
            )
    strict = how.missing is OnMissing.error
    jobs = plan(out, files, seen.found, how.max_bytes, decode=how.decode, strict=strict)
    with _folder(files, out, how, seen.sha256):
        done = {job.path: written for job in jobs if (written := finished(job)) is not None}
        kept, todo = len(done), [job for job in jobs if job.path not in done]
        refused = [line for written in done.values() for line in written.left_out]
        if strict and refused:  # of a set that was built with missing=skip, which stays as it is
            return Report(out, False, seen, sorted(refused), {}, kept, Counter())
        _check_space(out, sum(job.bytes for job in todo))
        (out / MANIFEST).unlink(missing_ok=True)
        for split in SPLITS:
            (out / split / MARKER).touch()
        for job, written in _write_all(todo, how.processes):
            done[job.path] = written
        if _state(files.json) != before:
            raise ValueError(f"{files.json} changed while it was read. Remove {out}, and build again.")
        results = [done[job.path] for job in jobs]
        left = sorted([*seen.left_out, *(line for written in results for line in written.left_out)])
        if left and strict:
            return Report(out, False, seen, left, {}, kept, Counter())
        report = Report(out, True, seen, left, _shards(jobs, done), kept, _taken(jobs, left))
        _finish(files, how, jobs, report)
    return report


def _finish(files: CorpusFiles, how: How, jobs: Sequence[Job], report: Report) -> None:
    """Take away what an earlier build left, and write the report and the manifests; the top one last."""
    out, paths = report.out, {job.path for job in jobs}
    for split, shards in report.shards.items():
        if not shards:
            raise ValueError(
                f"{files.json}: no record of {split} could be taken ({_by_reason(report.left_out)}). Nothing is built."
            )
        for tar in (out / split).glob("*.tar"):
            if tar not in paths:
                remove_shard(tar)
    for receipt in (out / RECEIPTS).glob("*-*.json"):
        if receipt not in {job.receipt for job in jobs}:
            receipt.unlink()
    lines = (json.dumps(line._asdict()) + "\n" for line in report.left_out)
    partial = out / RECEIPTS / LEFT_OUT
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, out / LEFT_OUT)
    for split, shards in report.shards.items():
        write_manifest(out / split, shards)
    write_json(out / MANIFEST, _manifest(files, how, report))


def _manifest(files: CorpusFiles, how: How, report: Report) -> dict[str, Any]:
    seen = report.survey
    splits = {
        split: {
            "samples": sum(shard.samples for shard in shards),
            "shards": [{**asdict(shard), "name": f"{split}/{shard.name}"} for shard in shards],
        }
        for split, shards in report.shards.items()
    }
    return {
        "made_of": _identity(files, how, seen.sha256),
        "records": seen.records,
        "sources": dict(sorted(seen.sources.items())),
        "taken": dict(sorted(report.taken.items())),
        "left_out": dict(sorted(Counter(line.reason for line in report.left_out).items())),
        "repeated_placeholders": seen.repeated,
        "leading_answers": seen.leading,
        "splits": splits,
    }


def _identity(files: CorpusFiles, how: How, sha256: str) -> dict[str, Any]:
    """What must not differ among the shards of one folder."""
    return {
        "version": BUILD_VERSION,
        "name": files.name,
        "json": files.json.name,
        "json_sha256": sha256,
        "val_samples": how.val_samples,
        "max_bytes": how.max_bytes,
        "decode": how.decode,
    }


@contextmanager
def _folder(files: CorpusFiles, out: Path, how: How, sha256: str) -> Iterator[None]:
    """``out``, for this build alone, and holding nothing else's shards."""
    receipts = out / RECEIPTS
    told = receipts / "made_of.json"
    if not told.exists() and any(tar for split in SPLITS for tar in (out / split).glob("*.tar")):
        raise ValueError(f"{out} holds shards that were not built by this command. Choose another out=, or empty it.")
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
    receipts.mkdir(exist_ok=True)
    with (receipts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another build writes here. Wait for it, or choose another out=.") from error
        mine = _identity(files, how, sha256)
        if told.exists():
            its = json.loads(told.read_bytes())
            differ = [f"{key} {its.get(key)} (now {value})" for key, value in mine.items() if its.get(key) != value]
            if differ:
                raise ValueError(
                    f"{out} was built otherwise: {', '.join(differ)}. Sets are never mixed: choose another out=, or "
                    "remove this one and build it again."
                )
        else:
            write_json(told, mine)
        for split in SPLITS:
            sweep(out / split)
        yield


def _write_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Written]]:
    """Each job as it is done."""
    if not jobs:
        return
    with bar(f"Writing {len(jobs)} shards", sum(len(job.records) for job in jobs)) as advance:
        if processes == 1 or len(jobs) == 1:
            for job in jobs:
                yield job, write_shard(job, advance)
        else:
            yield from _write_at_once(jobs, min(processes, len(jobs)), advance)


def _write_at_once(
    jobs: Sequence[Job], processes: int, advance: Callable[[int], None]
) -> Iterator[tuple[Job, Written]]:
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(count, stop))
    pending: dict[Future[Written], Job] = {}
    try:
        pending = {pool.submit(_in_process, job): job for job in jobs}
        told = 0
        while pending:
            ready, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = count.value
            advance(now - told)
            told = now
            for future in ready:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "A process that wrote shards was ended from outside (out of memory?). What is finished is kept: build "
            "again, perhaps with fewer processes=."
        ) from error
    finally:
        stop.set()  # Ctrl-C, or an error: the others stop at their next record and leave nothing half written
        pool.shutdown(wait=True, cancel_futures=True)


def _start(count: Any, stop: Any) -> None:
    """Ctrl-C is the main process's to answer, and nobody outlives it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared.update(count=count, stop=stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


_shared: dict[str, Any] = {}  # of a writing process


def _in_process(job: Job) -> Written:
    def advance(done: int) -> None:
        if _shared["stop"].is_set():
            raise Stopped
        with _shared["count"].get_lock():
            _shared["count"].value += done

    return write_shard(job, advance)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed * 1.02 > free:
        raise ValueError(
            f"{out}: {needed / 1e9:.1f} GB are to be written, but {free / 1e9:.1f} GB are free. Make room, or choose "
            "another out=."
        )


def _shards(jobs: Sequence[Job], done: dict[Path, Written]) -> dict[str, list[ShardInfo]]:
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for job in jobs:
        shard = done[job.path].shard
        if shard is not None:
            shards[job.split].append(shard)
    return shards


def _taken(jobs: Sequence[Job], left: Sequence[LeftOut]) -> Counter[str]:
    rows = {line.row for line in left}
    return Counter(record.source for job in jobs for record in job.records if record.row not in rows)


def _by_reason(left: Sequence[LeftOut]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(line.reason for line in left).most_common())


def _state(path: Path) -> tuple[int, int]:
    """Size and date of change; `survey` says it where the file is not there."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
