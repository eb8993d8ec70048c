"""What a shard holds and where: built strictly from its bytes, kept beside it, read without a Python object a sample.

The index of ``shard-000000.tar`` lies beside it as ``shard-000000.index.npz``. It holds the shard's size and SHA-256,
each member's place, CRC-32, extension and picture size, and each sample's key, members and columns.
"""

import hashlib
import io
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt16, UInt32
from numpy import ndarray

from deepstack_pl.batch import Refused
from deepstack_pl.data.columns import ROWS, Columns
from deepstack_pl.data.index_rules import broken_rules
from deepstack_pl.data.llava import source_of, text_length
from deepstack_pl.data.tars import read_members, refusal
from deepstack_pl.vision.images import EXTENSIONS, image_size

INDEX_VERSION = 1
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_IMAGE = re.compile(r"(?:(\d+)\.)?(\w+)")


@dataclass(frozen=True, slots=True, eq=False)
class ShardIndex:
    """One shard's samples; the arrays of all members are in the order of the archive.

    Attributes:
        name: of the tar.
        bytes: its length.
        sha256: of the whole of it.
        mtime_ns: its date of change when it was hashed; 0 where that says nothing.
        offset: where each member's bytes start.
        size: how many there are.
        crc: their CRC-32.
        extension: place in ``extensions``.
        width: in pixels; 0 of what is no picture.
        height: of the same.
        first: of each sample its first member; then the number of members.
        key_ends: of each sample where its key ends in ``key_bytes``, UTF-8, which starts where the one before it ends.
    """

    name: str
    bytes: int
    sha256: str
    mtime_ns: int
    extensions: tuple[str, ...]
    offset: Int64[ndarray, " m"]
    size: Int64[ndarray, " m"]
    crc: UInt32[ndarray, " m"]
    extension: UInt16[ndarray, " m"]
    width: Int32[ndarray, " m"]
    height: Int32[ndarray, " m"]
    first: Int64[ndarray, " n+1"]
    key_ends: Int64[ndarray, " n"]
    key_bytes: UInt8[ndarray, " k"]
    columns: Columns

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """The name of sample ``sample`` in the archive."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_bytes[start : int(self.key_ends[sample])].tobytes().decode()

    def members(self, sample: int) -> dict[str, int]:
        """For each extension of a sample its member."""
        start, end = (int(place) for place in self.first[sample : sample + 2])
        return {self.extensions[self.extension[member]]: member for member in range(start, end)}

    def images(self, sample: int) -> list[int]:
        """The sample's pictures among its members, in their order."""
        return [member for _, member in image_members(self.members(sample))]

    def save(self, path: Path) -> None:
        """Write to ``path``: the old file stays, or the new one is whole."""
        told = {"version": INDEX_VERSION, **{name: getattr(self, name) for name in _TOLD}}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        columns = {f"column_{name}": getattr(self.columns, name).astype(np.int32) for name in ROWS}
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                text = json.dumps({**told, "sources": self.columns.sources}, sort_keys=True).encode()
                np.savez(file, told=np.frombuffer(text, np.uint8), **arrays, **columns)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; the shard's name follows from the file's.

        Raises:
            ValueError: it is no index, or one of another version.
        """
        again = "Remove it, and it is built again from the shard (deepstack shards verify)."
        try:
            data = io.BytesIO(path.read_bytes())
            with zipfile.ZipFile(data) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")  # a small file could unfold into gigabytes
            with np.load(data, allow_pickle=False) as stored:
                told = json.loads(stored["told"].tobytes())
                if told["version"] != INDEX_VERSION:
                    raise ValueError(f"version {told['version']}, not {INDEX_VERSION}")
                arrays = {name: stored[name] for name in _ARRAYS}
                rows = {name: stored[f"column_{name}"].astype(np.int64) for name in ROWS}
            columns = Columns(**rows, sources=tuple(told["sources"]))
            values = {name: told[name] for name in _TOLD}
            values |= {"name": shard_of(path).name, "extensions": tuple(told["extensions"])}
            index = cls(**values, **arrays, columns=columns)
            index._check()
        except (*_SPOILED, zipfile.BadZipFile, struct.error) as error:
            raise ValueError(f"{path} is no index of a shard ({error}). {again}") from error
        return index

    def _check(self) -> None:
        samples, members = len(self), len(self.offset)
        lengths = {name: len(getattr(self, name)) for name in ("size", "crc", "extension", "width", "height")}
        whole = len(self.first) == samples + 1 and int(self.first[-1]) == members and set(lengths.values()) == {members}
        if not whole or {len(getattr(self.columns, name)) for name in ROWS} != {samples}:
            raise ValueError("its arrays differ in length")
        broken = broken_rules(self)
        if broken:
            raise ValueError(", ".join(broken))

    def same_as(self, other: "ShardIndex") -> bool:
        """Whether both say the same of the shard; its date and name do not count."""
        told = all(getattr(self, name) == getattr(other, name) for name in _TOLD if name not in ("name", "mtime_ns"))
        arrays = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS)
        mine, its = self.columns, other.columns
        rows = all(np.array_equal(getattr(mine, name), getattr(its, name)) for name in ROWS)
        return told and arrays and rows and mine.sources == its.sources


# What numpy and zipfile stumble over in a file that is none of ours.
_SPOILED = (ValueError, KeyError, TypeError, IndexError, EOFError, RecursionError, NotImplementedError, OverflowError)
_TOLD = ("name", "bytes", "sha256", "mtime_ns", "extensions")
_ARRAYS = tuple(f.name for f in fields(ShardIndex) if f.name not in (*_TOLD, "columns"))


def sidecar(shard: Path) -> Path:
    """Where the index of ``shard`` lies: ``X.tar``, ``X.index.npz``."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.index.npz")


def shard_of(index: Path) -> Path:
    """The other way round."""
    return index.with_name(f"{index.name.removesuffix('.index.npz')}.tar")


def image_members(members: dict[str, int]) -> list[tuple[str, int]]:
    """The pictures among a sample's members: ``png``, or ``0.png``, ``1.jpg``, ... by number."""
    found = ((_IMAGE.fullmatch(extension), extension) for extension in members)
    images = [(int(match[1] or 0), extension) for match, extension in found if match and match[2] in EXTENSIONS]
    return [(extension, members[extension]) for _, extension in sorted(images)]


def build_index(shard: Path, advance: Callable[[int], object] | None = None) -> ShardIndex:
    """The index of ``shard`` in one pass over its bytes, hashed and checked; ``advance`` is told how many are read.

    Raises:
        ValueError: damage, links, unsafe names, duplicate or scattered members, a sample without json or with one
            that cannot be read; names the shard and the place.
    """
    digest, builder = hashlib.sha256(), _Builder(shard)
    with shard.open("rb", buffering=2**18) as file:
        before = os.fstat(file.fileno())
        told = 0
        for member in read_members(shard, file, before.st_size, digest.update):
            builder.add(member.name, member.start, member.data)
            if advance is not None and member.start - told > 2**22:
                advance(member.start - told)
                told = member.start
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise refusal(shard, None, "changed while it was read", "Try again when nothing writes to it.")
    if advance is not None:
        advance(before.st_size - told)
    return builder.finish(digest.hexdigest(), before)


class _Builder:
    """Members, in the order of the archive, to arrays."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.members: list[tuple[int, int, int, int, int, int]] = []
        self.samples: list[tuple[int, int, int, int, int]] = []
        self.keys: dict[str, int] = {}  # and the sample's first member
        self.extensions: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self._here: dict[str, int] = {}  # members of the sample that is being read
        self._key, self._text, self._source = "", 0, ""

    def add(self, name: str, start: int, data: bytes) -> None:
        found = _KEY.fullmatch(name.removeprefix("./"))
        if found is None:
            raise refusal(self.shard, name, "is not named KEY.EXTENSION", "Name members like 000000012.json.")
        key, extension = found[1], found[2].lower()
        if not self._here or key != self._key:
            self._close()
            if key in self.keys:
                remedy = "Write a sample's members one after another, keys used once."
                raise refusal(self.shard, name, f"is apart from the other members of sample {key}", remedy)
            self.keys[key], self._key = len(self.members), key
        if extension in self._here:
            raise refusal(self.shard, name, "is there twice", "Give every sample its own key.")
        width = height = 0
        if extension == "json":
            self._text, self._source = self._read(name, data)
        elif extension.rpartition(".")[2] in EXTENSIONS:
            width, height = header_size(data)
        self._here[extension] = len(self.members)
        kind = self.extensions.setdefault(extension, len(self.extensions))
        self.members.append((start, len(data), crc32(data), kind, width, height))

    def _read(self, name: str, data: bytes) -> tuple[int, str]:
        try:
            values: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise refusal(self.shard, name, f"cannot be read ({error})", "Write the shard again.") from error
        return text_length(values), source_of(values)

    def _close(self) -> None:
        """Enter the sample that was read last."""
        if not self._here:
            return
        if "json" not in self._here:
            has = ", ".join(self._here)
            remedy = "Store its record as KEY.json beside it."
            raise refusal(self.shard, self._key, f"has no json (only {has})", remedy)
        images = [member for _, member in image_members(self._here)]
        width, height = self.members[images[0]][4:] if images else (0, 0)
        source = self.sources.setdefault(self._source, len(self.sources))
        self.samples.append((len(images), self._text, width, height, source))
        self._here = {}

    def finish(self, sha256: str, stat: os.stat_result) -> ShardIndex:
        self._close()
        members = np.array(self.members, np.int64).reshape(-1, 6).T
        samples = np.array(self.samples, np.int64).reshape(-1, 5).T
        encoded = [key.encode() for key in self.keys]
        return ShardIndex(
            name=self.shard.name,
            bytes=stat.st_size,
            sha256=sha256,
            mtime_ns=stat.st_mtime_ns,
            extensions=tuple(self.extensions),
            offset=members[0].copy(),
            size=members[1].copy(),
            crc=members[2].astype(np.uint32),
            extension=members[3].astype(np.uint16),
            width=members[4].astype(np.int32),
            height=members[5].astype(np.int32),
            first=np.array([*self.keys.values(), len(self.members)], np.int64),
            key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
            key_bytes=np.frombuffer(b"".join(encoded), np.uint8),
            columns=Columns(*(row.copy() for row in samples), sources=tuple(self.sources)),
        )


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height that a picture's header says; 0 of what is no picture: it is refused when it is decoded."""
    try:
        return image_size(data)
    except Refused:
        return 0, 0
