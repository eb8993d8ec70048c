"""Where records come from: shards read through their index, or one LLaVA-format JSON file and a folder of images.

A source is random access (the order is made in `stream`), travels to worker processes, and has a fingerprint that
changes when its data does. What is wrong with a record is an error that names it, never a sample left out.
"""

import copy
import hashlib
import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, Self

import numpy as np

from deepstack_pl.batch import Record
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.fine_print import write_fine_print
from deepstack_pl.data.images import EXTENSIONS, decode_image
from deepstack_pl.data.llava import check_turns, record_from_llava
from deepstack_pl.data.shards import Entry, file_sha256, read_index, read_manifest
from deepstack_pl.data.stream import order

OPEN_SHARDS = 32  # files that one process keeps open
HOLD_OUT_SEED = 0  # not the run's: every run of a comparison validates on the same records


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are made from."""
        ...

    def describe(self) -> str:
        """One line for the log."""
        ...


class ShardSource:
    """The samples of all ``*.tar`` of a folder, in the order of names, read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = sorted(folder.glob("*.tar"))
        if not self.shards:
            what = "holds no *.tar shards" if folder.is_dir() else "is not there"
            raise ValueError(
                f"{folder} {what}. data=shards reads <data.root>/train/*.tar and <data.root>/val/*.tar: "
                "write them with deepstack_pl.data.shards.ShardWriter, or correct data.root."
            )
        self._manifest = {shard.name: shard for shard in read_manifest(folder) or ()}
        unlisted = [shard.name for shard in self.shards if self._manifest and shard.name not in self._manifest]
        if unlisted:
            raise ValueError(
                f"{folder}: {', '.join(unlisted[:3])} ({len(unlisted)} in all) not in its manifest.json. "
                "Remove what does not belong, or the manifest if it does."
            )
        self._entries: list[tuple[int, Entry]] = []
        for number, shard in enumerate(self.shards):
            self._entries += ((number, entry) for entry in read_index(shard))
        if not self._entries:
            raise ValueError(f"{folder}: its {len(self.shards)} shards hold no samples. Write them again.")
        self._files = _Files()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Record:
        number, entry = self._entries[index]
        shard = self.shards[number]
        key = f"{self.folder.name}/{shard.name}:{entry.key}"
        try:
            values = json.loads(self._files.read(shard, *entry.members["json"]))
        except ValueError as error:
            raise ValueError(f"{key}: its json cannot be read ({error}). Write the shard again.") from error
        images = [
            decode_image(self._files.read(shard, *entry.members[extension]), f"{key}.{extension}")
            for extension in _image_members(entry)
        ]
        return record_from_llava(values, images, key)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for shard in self.shards:
                listed = self._manifest.get(shard.name)
                digest.update(f"{shard.name} {shard.stat().st_size} ".encode())
                digest.update((listed.sha256 if listed else file_sha256(shard)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> str:
        unread = Counter(
            extension
            for _, entry in self._entries
            for extension in entry.members.keys() - {"json", *_image_members(entry)}
        )
        line = f"{len(self):,} samples in {len(self.shards)} shards of {self.folder}"
        left = ", ".join(f"{count:,} .{extension}" for extension, count in sorted(unread.items()))
        return f"{line}; members that are not read: {left}" if left else line


class LlavaJsonSource:
    """A LLaVA-format JSON file: a list of ``{"id", "image": name or list of names, "conversations"}``.

    Everything that can be checked without decoding is checked at once: roles, placeholders, missing images.
    """

    def __init__(self, path: Path, images: Path | None, rows: Sequence[int] | None = None) -> None:
        self.path, self.images = path, images
        self._records = _read_list(path)
        self._names = [_image_names(values, f"{path.name}:{row}") for row, values in enumerate(self._records)]
        self.rows = range(len(self._records)) if rows is None else rows
        for row, (values, names) in enumerate(zip(self._records, self._names, strict=True)):
            check_turns(values, len(names), f"{path.name}:{row}")
        self._sizes = self._find_images()
        self._file_sha256 = file_sha256(path)

    def subset(self, rows: Sequence[int]) -> Self:
        """The same file, these rows alone."""
        chosen = copy.copy(self)
        chosen.rows = rows
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Record:
        row = self.rows[index]
        key = f"{self.path.name}:{row}"
        files = [self._file(name) for name in self._names[row]]
        return record_from_llava(
            self._records[row], [decode_image(file.read_bytes(), f"{key}, {file}") for file in files], key
        )

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._file_sha256.encode())
        for name, size in sorted(self._sizes.items()):
            digest.update(f"\n{name} {size}".encode())
        digest.update(json.dumps(list(self.rows)).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        text_only = sum(not self._names[row] for row in self.rows)
        return f"{len(self):,} of {len(self._records):,} records of {self.path}, {text_only:,} without an image"

    def _file(self, name: str) -> Path:
        assert self.images is not None
        return self.images / name

    def _find_images(self) -> dict[str, int]:
        """The size of every image; images are looked up once, now, and not after three hours."""
        wanted = {name: row for row, names in enumerate(self._names) for name in names}
        if wanted and self.images is None:
            raise ValueError(f"{self.path}: its records name images. Say data.images=FOLDER where their paths start.")
        if self.images is not None and not self.images.is_dir():
            raise ValueError(f"data.images={self.images} is no folder. Name the one that the image paths start from.")
        found = {name: self._file(name).stat().st_size for name in wanted if self._file(name).is_file()}
        missing = [name for name in wanted if name not in found]
        if missing:
            first = ", ".join(f"{name} (record {wanted[name]})" for name in missing[:3])
            raise ValueError(
                f"{len(missing)} of {len(wanted)} images of {self.path} are not under {self.images}: {first}"
                f"{', ...' if len(missing) > 3 else ''}. Fetch them, correct data.images, or take the records out."
            )
        return found


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """Training and validation source; the fine print set is written first where it is not there yet.

    ``llava_json`` holds records out by a fixed seed: ``val_samples`` of them, or a fifth of a small file.
    """
    if config.source is Kind.llava_json:
        return _split_json(config)
    root = Path(config.root)
    if config.source is Kind.fine_print:
        root = write_fine_print(config.fine_print, root)
    return ShardSource(root / "train"), ShardSource(root / "val")


def _split_json(config: DataConfig) -> tuple[Source, Source]:
    if config.path is None:
        raise ValueError("data.source=llava_json reads one file: say data.path=FILE.json data.images=FOLDER.")
    source = LlavaJsonSource(Path(config.path), Path(config.images) if config.images else None)
    count = len(source)
    if count < 2:
        raise ValueError(f"data.path={config.path} holds one record; training and validation need one each. Add more.")
    if config.val_samples < 1:
        raise ValueError(f"data.val_samples={config.val_samples}: validation needs at least one record.")
    held_out = config.val_samples if count >= 2 * config.val_samples else max(1, count // 5)
    shuffled = order(count, HOLD_OUT_SEED, 0)
    val, train = (np.sort(part).tolist() for part in np.split(shuffled, [held_out]))
    return source.subset(train), source.subset(val)


class _Files:
    """Open shards of one process, read by position; a forked or pickled copy opens its own."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._owner = os.getpid()

    def read(self, path: Path, start: int, size: int) -> bytes:
        if self._owner != os.getpid():
            self._close()
            self._owner = os.getpid()
        if path not in self._open:
            self._open[path] = path.open("rb", buffering=0)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        data = os.pread(self._open[path].fileno(), size, start)
        if len(data) != size:
            raise ValueError(f"{path}: {len(data)} bytes at {start}, not {size}: the shard changed while it was in use")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict(), "_owner": 0}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _image_members(entry: Entry) -> list[str]:
    """The sample's image extensions: ``png``, or ``0.png``, ``1.jpg``, ... by number."""
    found = ((re.fullmatch(r"(?:(\d+)\.)?(\w+)", extension), extension) for extension in entry.members)
    images = [(int(match[1] or 0), extension) for match, extension in found if match and match[2] in EXTENSIONS]
    return [extension for _, extension in sorted(images)]


def _read_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"data.path={path} is not there. Name a JSON file in LLaVA's format.")
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data.path={path} is no JSON ({error}). LLaVA's format is one list of records.") from error
    if not isinstance(records, list) or not records or not all(isinstance(values, dict) for values in records):
        raise ValueError(
            f"data.path={path} is not a list of records, at least one. LLaVA's format is "
            '[{"id": ..., "image": ..., "conversations": [...]}, ...].'
        )
    return records


def _image_names(values: dict[str, Any], key: str) -> list[str]:
    """The images that a record names; a record without any is text-only."""
    names = values.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key}: image is {values['image']!r}. Give a file name, or a list of them.")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{key}: image {name} leaves the image folder. Name images relative to data.images.")
    return names
