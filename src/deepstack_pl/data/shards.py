"""Standard WebDataset tars: written so that the same samples give the same bytes, read through a strict index.

A sample is adjacent members of one key: ``000000012.json`` (the record, verbatim) beside its image under the extension
that its bytes call for, or ``000000012.0.png``, ``000000012.1.jpg`` where there are several. Python's tarfile takes
damage in the middle of an archive for its end, and a reader that trusts it loses the rest of a shard in silence; the
index refuses instead.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from webdataset.writer import TarWriter

from deepstack_pl.data.images import describe_bytes, sniff

MANIFEST = "manifest.json"
MARKER = "unfinished.partial"  # in a folder from the writer's first moment until its manifest is written
BLOCK = tarfile.BLOCKSIZE


class Entry(NamedTuple):
    """One sample's place in a shard: for each extension, where the bytes start and how many there are."""

    key: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished shard, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes samples into ``shard-000000.tar``, ``shard-000001.tar``, ... and, when closed, a manifest beside them.

    A shard appears under its name when it is whole. Leaving the ``with`` block by an error throws the unfinished
    shard away and writes no manifest; `MARKER` stays, and whoever opens the folder is told that samples are missing.

        with ShardWriter(Path("data/mine/train")) as writer:
            writer.write({"id": "7", "image": "cat.jpg", "conversations": [...]}, [Path("cat.jpg").read_bytes()])
    """

    def __init__(self, folder: Path, max_bytes: int = 256 * 2**20, max_samples: int = 100_000) -> None:
        if max_bytes < 1 or max_samples < 1:
            raise ValueError(f"max_bytes={max_bytes}, max_samples={max_samples}: a shard holds at least one sample.")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists() or any(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds shards already. Write to a new folder, or empty this one first.")
        for left in (*folder.glob(".shard-*.tar.partial"), folder / f".{MANIFEST}.partial"):
            left.unlink(missing_ok=True)  # of a writer that was killed, in a folder that was emptied of its shards
        (folder / MARKER).touch()
        self.folder, self.max_bytes, self.max_samples = folder, max_bytes, max_samples
        self.shards: list[ShardInfo] = []
        self._tar: TarWriter | None = None
        self._file: BinaryIO | None = None
        self._bytes = self._samples = self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
            self._partial.unlink()

    def write(self, record: Mapping[str, Any] | bytes, images: Sequence[bytes] = ()) -> str:
        """Append one sample (``record`` as bytes is stored untouched) and return its key.

        Raises:
            ValueError: bytes given as an image are none.
        """
        key = f"{self._written:09d}"
        sample = {"json": record if isinstance(record, bytes) else json.dumps(dict(record)).encode()}
        for place, data in enumerate(images):
            extension = sniff(data)
            if extension is None:
                raise ValueError(
                    f"sample {key}, image {place}: {describe_bytes(data)}. Fetch it again, or leave the record out."
                )
            sample[extension if len(images) == 1 else f"{place}.{extension}"] = data
        size = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in sample.values())
        if self._samples and (self._samples == self.max_samples or self._bytes + size > self.max_bytes):
            self._finish_shard()
        if self._tar is None:
            self._file = self._partial.open("wb")
            self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._tar.write({"__key__": key, **sample})
        self._bytes += size
        self._samples += 1
        self._written += 1
        return key

    def close(self) -> None:
        """Finish the last shard, write the manifest and take the marker away."""
        if self._tar is not None:
            self._finish_shard()
        manifest = {"samples": self._written, "shards": [asdict(shard) for shard in self.shards]}
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / MARKER).unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return f"shard-{len(self.shards):06d}.tar"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._name}.partial"

    def _finish_shard(self) -> None:
        assert self._tar is not None
        assert self._file is not None
        self._tar.close()
        self._file.close()
        path = self.folder / self._name
        os.replace(self._partial, path)
        self.shards.append(ShardInfo(path.name, self._samples, path.stat().st_size, file_sha256(path)))
        self._tar = self._file = None
        self._bytes = self._samples = 0


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


def hash_shards(shards: Sequence[Path], manifest: Sequence[ShardInfo] | None) -> list[str]:
    """The SHA-256 of every shard as it lies there, which is the one that the manifest lists where there is one."""
    listed = {shard.name: shard.sha256 for shard in manifest or ()}
    digests = []
    for shard in shards:
        found = file_sha256(shard)
        if manifest is not None and listed[shard.name] != found:
            raise ValueError(
                f"{shard} has sha256 {found[:12]}..., but {shard.with_name(MANIFEST)} lists it with "
                f"{listed[shard.name][:12]}...: it was changed or damaged after it was written. Fetch or write the "
                "shards again; if you changed them on purpose, remove the manifest."
            )
        digests.append(found)
    return digests


def read_manifest(folder: Path) -> list[ShardInfo] | None:
    """The shards that the folder's manifest lists, each checked to be there in its size; None without a manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        shards = [_listed(**values) for values in json.loads(path.read_bytes())["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of shards ({error}). Remove it, or write the shards again.") from error
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


def _listed(*, name: str, samples: int, bytes: int, sha256: str) -> ShardInfo:
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise TypeError(f"name {name!r}, sha256 {sha256!r}: both are text")
    return ShardInfo(name, samples, bytes, sha256)


def read_index(shard: Path) -> list[Entry]:
    """Where every sample of ``shard`` lies, in one pass over its headers.

    Raises:
        ValueError: damage, links, unsafe names, duplicate or scattered members, a sample without json.
    """
    entries: list[Entry] = []
    seen: set[str] = set()
    for name, start, size in _members(shard):
        found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name.removeprefix("./"))
        if found is None:
            raise _refusal(shard, name, "is not named KEY.EXTENSION", "Name members like 000000012.json.")
        key, extension = found[1], found[2].lower()
        if not entries or entries[-1].key != key:
            if key in seen:
                remedy = "Write a sample's members one after another, keys used once."
                raise _refusal(shard, name, f"is apart from the other members of sample {key}", remedy)
            seen.add(key)
            entries.append(Entry(key, {}))
        if extension in entries[-1].members:
            raise _refusal(shard, name, "is there twice", "Give every sample its own key.")
        entries[-1].members[extension] = (start, size)
    for entry in entries:
        if "json" not in entry.members:
            has = ", ".join(entry.members)
            raise _refusal(shard, entry.key, f"has no json (only {has})", "Store its record as KEY.json beside it.")
    return entries


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of every member, after which the archive must end as archives end."""
    again = "Fetch or write the shard again."
    length = shard.stat().st_size
    if not length or length % BLOCK:
        raise _refusal(shard, None, f"{length} bytes are no whole number of {BLOCK}-byte blocks: it is cut off", again)
    name, end = None, 0
    with shard.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    name = member.name
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if end > length:
                        raise _refusal(shard, name, f"ends at byte {end}, beyond the file's {length}", again)
                    _check_member(shard, member)
                    if member.isreg():
                        yield name, member.offset_data, member.size
        except tarfile.TarError as error:
            raise _refusal(shard, name, f"is the last member that can be read ({error})", again) from error
        file.seek(end)
        if len(file.read(2 * BLOCK).strip(b"\0")) or length - end < 2 * BLOCK:
            raise _refusal(shard, name, f"is followed at byte {end} by no end-of-archive marker", again)
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise _refusal(shard, name, f"is followed by the end of the archive at byte {end}, then by more", again)


def _check_member(shard: Path, member: tarfile.TarInfo) -> None:
    again = "Write the shard again from plain files."
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _refusal(shard, member.name, "is a link, a device or sparse, not a plain file", again)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise _refusal(shard, member.name, "leaves the archive's folder", again)
    if not member.name.isascii():
        try:
            member.name.encode()
        except UnicodeEncodeError as error:
            raise _refusal(shard, repr(member.name), "has a name that is not UTF-8", again) from error


def _refusal(shard: Path, member: str | None, what: str, remedy: str) -> ValueError:
    return ValueError(f"{shard}: {f'member {member} ' if member else ''}{what}. {remedy}")
