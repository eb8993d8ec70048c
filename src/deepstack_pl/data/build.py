"""A LLaVA-format corpus into WebDataset shards: looked through first, then written by several processes.

``out/train`` and ``out/val`` hold the shards with their indexes and manifests, ``out/manifest.json`` says what they
were made of, ``out/left_out.jsonl`` has a line for every record that was not taken. A folder is marked unfinished from
the first shard until its manifest is written; building again keeps the shards that are finished, and a finished set
stays as it is until what replaces its shards is written.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepstack_pl.data.build_folder import LEFT_OUT, aside, check_space, folder_of, mark, move, spare, stands
from deepstack_pl.data.config import OnMissing
from deepstack_pl.data.corpora import SPLITS, CorpusFiles, LeftOut, Survey, survey
from deepstack_pl.data.shard_jobs import RECEIPTS, Job, Written, finished, plan, remove_shard
from deepstack_pl.data.shard_writers import write_all
from deepstack_pl.data.shards import MANIFEST, ShardInfo, write_json, write_manifest

BUILD_VERSION = 1  # of what is written from the same files
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
        text_only: how many of them have no image.
    """

    out: Path
    whole: bool
    survey: Survey
    left_out: list[LeftOut]
    shards: dict[str, list[ShardInfo]]
    kept: int
    taken: Counter[str]
    text_only: int = 0

    @property
    def listed(self) -> Path:
        """The file with a line for every record that cannot be taken; beside ``out`` where that is not built."""
        return self.out / LEFT_OUT if self.whole else _beside(self.out)


def build(files: CorpusFiles, out: Path, how: How) -> Report:
    """Build the shards of a corpus into ``out``.

    Raises:
        ValueError: the JSON file is none, nothing can be taken, ``out`` holds something else, or the disk is too small.
        KeyboardInterrupt: stopped; what is finished is kept.
    """
    before = _state(files.json)
    seen = survey(files, how.val_samples)
    if seen.left_out and how.missing is OnMissing.error:
        return _not_built(Report(out, False, seen, seen.left_out, {}, 0, Counter()))
    for split, found in seen.found.items():
        if not found:
            raise ValueError(
                f"{files.json}: no record can be taken for {split} ({_by_reason(seen.left_out)}). Fetch what is "
                f"missing, or correct data.images={files.images}."
            )
    strict = how.missing is OnMissing.error
    jobs = plan(out, files, seen.found, how.max_bytes, decode=how.decode, strict=strict)
    with folder_of(out, _identity(files, how, seen.sha256)):
        done = {job.path: written for job in jobs if (written := finished(job)) is not None}
        kept, todo = len(done), [job for job in jobs if job.path not in done]
        refused = [line for written in done.values() for line in written.left_out]
        if strict and refused:  # of a set that was built with missing=skip, which stays as it is
            return _not_built(Report(out, False, seen, sorted(refused), {}, kept, Counter()))
        stood = stands(out)
        if not todo and stood and not spare(out, jobs):  # nothing to do, and nobody who reads it is disturbed
            left = sorted([*seen.left_out, *refused])
            return _report(out, seen, left, jobs, done, kept)
        if not stood:
            mark(out)
        new = {job.path: replace(job, out=aside(out)) if stood else job for job in todo}
        done |= _write(out, new, how.processes)
        if _state(files.json) != before:
            raise ValueError(f"{files.json} changed while it was read. Remove {out}, and build again.")
        results = [done[job.path] for job in jobs]
        left = sorted([*seen.left_out, *(line for written in results for line in written.left_out)])
        if left and strict:
            return _not_built(Report(out, False, seen, left, {}, kept, Counter()))
        report = _report(out, seen, left, jobs, done, kept)
        for split, shards in report.shards.items():
            if not shards:
                reasons = _by_reason(left)
                raise ValueError(f"{files.json}: no record of {split} could be taken ({reasons}). Nothing is built.")
        if stood:
            mark(out)
            for job in todo:
                move(new[job.path], job, done[job.path])
        _finish(files, how, jobs, report)
    return report


def _write(out: Path, jobs: dict[Path, Job], processes: int) -> dict[Path, Written]:
    """Write the jobs, by the place that their shards are for; those that a build left aside are kept."""
    places = {job.path: place for place, job in jobs.items()}
    done = {place: written for place, job in jobs.items() if (written := finished(job)) is not None}
    todo = [job for place, job in jobs.items() if place not in done]
    check_space(out, sum(job.bytes for job in todo))
    for job in todo:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.receipt.parent.mkdir(parents=True, exist_ok=True)
    try:
        done |= {places[job.path]: written for job, written in write_all(todo, processes)}
    except OSError as error:
        raise ValueError(
            f"{out}: the build stopped at {error.filename or 'a shard'} ({error.strerror or error}). Make room, or "
            "mend that file, and build again: the shards that are finished are kept."
        ) from error
    return done


def _report(
    out: Path, seen: Survey, left: list[LeftOut], jobs: Sequence[Job], done: dict[Path, Written], kept: int
) -> Report:
    rows = {line.row for line in left}
    taken = [record for job in jobs for record in job.records if record.row not in rows]
    text_only = sum(not record.images for record in taken)
    sources = Counter(record.source for record in taken)
    return Report(out, True, seen, left, _shards(jobs, done), kept, sources, text_only)


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.{LEFT_OUT}")


def _not_built(report: Report) -> Report:
    """List what cannot be taken beside ``out``, which stays as it is."""
    report.listed.parent.mkdir(parents=True, exist_ok=True)
    _list(report, report.listed)
    return report


def _list(report: Report, file: Path) -> None:
    file.write_text("".join(json.dumps(line._asdict()) + "\n" for line in report.left_out), encoding="utf-8")


def _finish(files: CorpusFiles, how: How, jobs: Sequence[Job], report: Report) -> None:
    """Take away what an earlier build left, and write the report and the manifests; the top one last."""
    out = report.out
    for tar in spare(out, jobs):
        remove_shard(tar)
    shutil.rmtree(aside(out), ignore_errors=True)
    for receipt in (out / RECEIPTS).glob("*-*.json"):
        if receipt not in {job.receipt for job in jobs}:
            receipt.unlink()
    partial = out / RECEIPTS / LEFT_OUT
    _list(report, partial)
    os.replace(partial, report.listed)
    for split, shards in report.shards.items():
        write_manifest(out / split, shards)
    write_json(out / MANIFEST, _manifest(files, how, report))
    _beside(out).unlink(missing_ok=True)  # of an attempt before


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
        "unanswered_questions": seen.trailing,
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


def _shards(jobs: Sequence[Job], done: dict[Path, Written]) -> dict[str, list[ShardInfo]]:
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for job in jobs:
        shard = done[job.path].shard
        if shard is not None:
            shards[job.split].append(shard)
    return shards


def _by_reason(left: Sequence[LeftOut]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(line.reason for line in left).most_common())


def _state(path: Path) -> tuple[int, int]:
    """Size and date of change; `survey` says it where the file is not there."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
