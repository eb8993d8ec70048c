"""One shard of a corpus, planned beforehand and written by whichever process takes it: its bytes are the same.

Beside the shards stands ``.build/``: for each shard what it was made of and what was left out of it, so that building
again keeps what is finished.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.data.corpora import CorpusFiles, Found, LeftOut
from deepstack_pl.data.index import ShardIndex, sidecar
from deepstack_pl.data.llava import record_from_llava
from deepstack_pl.data.shards import ShardFile, ShardInfo, sample_members, shard_name, write_json
from deepstack_pl.data.tars import MAX_MEMBER
from deepstack_pl.vision.images import decode_image, image_size

RECEIPTS = ".build"


class Stopped(Exception):
    """The user stopped the build."""


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to be written: its records, and how."""

    out: Path
    split: str
    number: int
    files: CorpusFiles
    records: tuple[Found, ...]
    decode: bool
    strict: bool  # nothing is written if a record cannot be taken

    @property
    def path(self) -> Path:
        return self.out / self.split / shard_name(self.number)

    @property
    def receipt(self) -> Path:
        return self.out / RECEIPTS / f"{self.split}-{self.number:06d}.json"

    @property
    def identity(self) -> str:
        """Digest of the rows, of the images' folder, and of their size and date: with the same JSON file, the same
        shard.
        """
        folder = None if self.files.images is None else str(self.files.images.resolve())
        rows = [(record.row, record.size, record.images) for record in self.records]
        return hashlib.sha256(json.dumps([folder, rows]).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """What the shard takes, about."""
        return sum(record.stored for record in self.records)


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a job; ``shard`` is None where no record was left to write."""

    identity: str
    shard: ShardInfo | None
    left_out: tuple[LeftOut, ...]


def plan(out: Path, files: CorpusFiles, found: dict[str, list[Found]], max_bytes: int, **how: bool) -> list[Job]:
    """The shards of both splits, cut where the next record would exceed ``max_bytes``."""
    jobs: list[Job] = []
    for split, records in found.items():
        for number, part in enumerate(_parts(records, max_bytes)):
            jobs.append(Job(out, split, number, files, part, **how))
    return jobs


def _parts(records: Sequence[Found], max_bytes: int) -> Iterator[tuple[Found, ...]]:
    part: list[Found] = []
    size = 0
    for record in records:
        if part and size + record.stored > max_bytes:
            yield tuple(part)
            part, size = [], 0
        part.append(record)
        size += record.stored
    if part:
        yield tuple(part)


def finished(job: Job) -> Written | None:
    """What is there of ``job`` already: the same records, and the shard as it was written; None otherwise."""
    try:
        told: dict[str, Any] = json.loads(job.receipt.read_bytes())
        shard = told["shard"] and ShardInfo(**told["shard"])
        written = Written(told["identity"], shard, tuple(LeftOut(*line) for line in told["left_out"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # of an earlier version, or damaged: the shard is written again
        return None
    if written.identity != job.identity:
        return None
    if written.shard is None:
        return written
    try:
        there, index = job.path.stat(), ShardIndex.load(sidecar(job.path))
    except (OSError, ValueError):  # no shard, or none with an index that can be read
        return None
    same = (index.bytes, index.mtime_ns) == (there.st_size, there.st_mtime_ns) and index.sha256 == written.shard.sha256
    return written if same else None


def write_shard(job: Job, advance: Callable[[int], object]) -> Written:
    """Write the shard, its index and its receipt; ``advance`` is told of every record.

    A job that is strict leaves nothing where a record is refused, and says which.
    """
    job.receipt.unlink(missing_ok=True)
    refused: list[LeftOut] = []
    samples = 0
    shard = ShardFile(job.path)
    try:
        with job.files.json.open("rb", buffering=0) as file:
            for record in job.records:
                key = f"{job.files.json.name}:{record.row}"
                data = os.pread(file.fileno(), record.size, record.start)
                try:
                    members = _members(job, record, data, key)
                except Refused as error:
                    images = ", ".join(name for name, _, _ in record.images)
                    refused.append(LeftOut(record.row, record.id, images, error.reason.name, error.sentence))
                else:
                    if not (job.strict and refused):
                        shard.write(f"{record.row:09d}", members)
                        samples += 1
                advance(1)
        if not samples or (job.strict and refused):
            shard.discard()
            written = Written(job.identity, None, tuple(refused))
        else:
            written = Written(job.identity, ShardInfo.of(shard.finish()), tuple(refused))
    except BaseException:
        shard.discard()
        raise
    if written.shard is None:
        remove_shard(job.path)
    if not (job.strict and refused):
        write_json(job.receipt, {**asdict(written), "left_out": [list(line) for line in refused]})
    return written


def remove_shard(tar: Path) -> None:
    """A shard of an earlier build, and its index."""
    tar.unlink(missing_ok=True)
    sidecar(tar).unlink(missing_ok=True)


def _members(job: Job, record: Found, data: bytes, key: str) -> dict[str, bytes]:
    """The sample's members, its images read, and proved as a run will read them."""
    images, pictures = [], []
    for name, size, _ in record.images:
        where = f"{key}, {name}"
        assert job.files.images is not None
        if size > MAX_MEMBER:
            raise Refused(Reason.image, f"{where}: {size} bytes; at most {MAX_MEMBER:,} are stored. Leave it out.")
        try:
            images.append((job.files.images / name).read_bytes())
        except FileNotFoundError as error:
            says = f"{where} was there and is gone. Fetch it, or leave its record out."
            raise Refused(Reason.missing, says) from error
        if job.decode:
            pictures.append(decode_image(images[-1], where))
        else:
            image_size(images[-1], where)
    members = sample_members(data, images, key)
    if job.decode:
        record_from_llava(json.loads(data), pictures, key)
    return members
