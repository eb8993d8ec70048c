"""Standard WebDataset tars, written so that the same samples give the same bytes, and the manifest beside them.

A sample is adjacent members of one key: ``000000012.json`` (the record, verbatim) beside its image under the extension
that its bytes call for, or ``000000012.0.png``, ``000000012.1.jpg`` where there are several. Each shard has its index
beside it, see `index`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from webdataset.writer import TarWriter

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.data.index import ShardIndex, build_index, sidecar
from deepstack_pl.data.tars import BLOCK
from deepstack_pl.vision.images import describe_bytes, sniff

MANIFEST = "manifest.json"
MARKER = "unfinished.partial"  # in a folder from the writer's first moment until its manifest is written


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished shard, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, index: ShardIndex) -> Self:
        """As the index of the shard has it."""
        return cls(index.name, len(index), index.bytes, index.sha256)


class ShardFile:
    """One shard: it is written under a temporary name, and appears with its index when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self._file = self.partial.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append the members of one sample, by extension."""
        self._tar.write({"__key__": key, **members})

    def finish(self) -> ShardIndex:
        """Read it back, write its index, and give it its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = replace(build_index(self.partial), name=self.path.name)
        index.save(sidecar(self.path))
        os.replace(self.partial, self.path)
        return index

    def discard(self) -> None:
        """Leave nothing of it."""
        try:
            self._tar.close()
            self._file.close()
        finally:
            self.partial.unlink(missing_ok=True)


def sample_members(record: bytes, images: Sequence[bytes], key: str) -> dict[str, bytes]:
    """A sample's members by extension; pictures under the extension that their bytes call for.

    Raises:
        Refused: bytes given as an image are none.
    """
    members = {"json": record}
    for place, data in enumerate(images):
        extension = sniff(data)
        if extension is None:
            raise Refused(
                Reason.image,
                f"{key}, image {place}: {describe_bytes(data)}. Fetch it again, or leave the record out.",
            )
        members[extension if len(images) == 1 else f"{place}.{extension}"] = data
    return members


def stored_bytes(sizes: Sequence[int]) -> int:
    """What members of these sizes take in a shard."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


class ShardWriter:
    """Writes samples into ``shard-000000.tar``, ``shard-000001.tar``, ... and, when closed, a manifest beside them.

    A shard appears under its name, with its index, when it is whole. Leaving the ``with`` block by an error throws the
    unfinished shard away and writes no manifest; `MARKER` stays, and whoever opens the folder is told that samples are
    missing.

        with ShardWriter(Path("data/mine/train")) as writer:
            writer.write({"id": "7", "image": "cat.jpg", "conversations": [...]}, [Path("cat.jpg").read_bytes()])
    """

    def __init__(self, folder: Path, max_bytes: int = 256 * 2**20, max_samples: int = 100_000) -> None:
        if max_bytes < 1 or max_samples < 1:
            raise ValueError(f"max_bytes={max_bytes}, max_samples={max_samples}: a shard holds at least one sample.")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists() or any(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds shards already. Write to a new folder, or empty this one first.")
        sweep(folder)
        (folder / MARKER).touch()
        self.folder, self.max_bytes, self.max_samples = folder, max_bytes, max_samples
        self.shards: list[ShardInfo] = []
        self._shard: ShardFile | None = None
        self._bytes = self._samples = self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.discard()

    def write(self, record: Mapping[str, Any] | bytes, images: Sequence[bytes] = ()) -> str:
        """Append one sample (``record`` as bytes is stored untouched) and return its key.

        Raises:
            Refused: bytes given as an image are none.
        """
        key = f"{self._written:09d}"
        record = record if isinstance(record, bytes) else json.dumps(dict(record)).encode()
        members = sample_members(record, images, f"sample {key}")
        size = stored_bytes([len(data) for data in members.values()])
        if self._samples and (self._samples == self.max_samples or self._bytes + size > self.max_bytes):
            self._finish_shard()
        if self._shard is None:
            self._shard = ShardFile(self.folder / shard_name(len(self.shards)))
        self._shard.write(key, members)
        self._bytes += size
        self._samples += 1
        self._written += 1
        return key

    def close(self) -> None:
        """Finish the last shard, write the manifest and take the marker away."""
        if self._shard is not None:
            self._finish_shard()
        write_manifest(self.folder, self.shards)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self.shards.append(ShardInfo.of(self._shard.finish()))
        self._shard = None
        self._bytes = self._samples = 0


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def sweep(folder: Path) -> None:
    """Remove what a writer that was killed left half written."""
    for left in (*folder.glob(".shard-*.partial"), *folder.glob(".shard-*.npz.*"), folder / f".{MANIFEST}.partial"):
        left.unlink(missing_ok=True)


def write_manifest(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """List the shards of a folder, and take the marker away: it is whole."""
    samples = sum(shard.samples for shard in shards)
    write_json(folder / MANIFEST, {"samples": samples, "shards": [asdict(shard) for shard in shards]})
    (folder / MARKER).unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` so that the file is either the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finished(folder: Path) -> None:
    """Refuse a folder in which a writer, or a download, left off."""
    left = sorted(path.name for path in folder.glob("*.partial"))
    if left:
        raise ValueError(
            f"{folder} holds {', '.join(left[:3])}: its shards are still being written, or that was interrupted and "
            "samples are missing. Remove the folder and write the shards again; if you want those that are there and "
            "no more, remove what ends in .partial."
        )


def list_manifest(folder: Path) -> list[ShardInfo] | None:
    """The shards that the folder's manifest lists, whether or not they are there; None without a manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return [listed_shard(**values) for values in json.loads(path.read_bytes())["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of shards ({error}). Remove it, or write the shards again.") from error


def read_manifest(folder: Path) -> list[ShardInfo] | None:
    """The shards that the folder's manifest lists, each checked to be there in its size; None without a manifest."""
    path, shards = folder / MANIFEST, list_manifest(folder)
    if shards is None:
        return None
    for shard in shards:
        file = folder / shard.name
        found = file.stat().st_size if file.exists() else None
        if found != shard.bytes:
            what = "is not there" if found is None else f"has {found} bytes"
            raise ValueError(
                f"{file} {what}, but {path} lists it with {shard.bytes} bytes. Fetch or write the shards again; "
                "if you changed them on purpose, remove the manifest."
            )
    return shards


def listed_shard(*, name: str, samples: int, bytes: int, sha256: str) -> ShardInfo:
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise TypeError(f"name {name!r}, sha256 {sha256!r}: both are text")
    if not name.isprintable() or "/" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a shard")
    return ShardInfo(name, samples, bytes, sha256)
