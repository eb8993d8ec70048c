"""Where records come from: shards read through their index, or one LLaVA-format JSON file and a folder of images.

A source is random access (the order is made in `stream`), travels to worker processes, and has a fingerprint that
changes when its data does. What is wrong with a record is an error that names it, never a sample left out.
"""

import hashlib
import json
import os
import re
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from deepstack_pl.batch import Record
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.fine_print import write_fine_print
from deepstack_pl.data.images import EXTENSIONS, decode_image
from deepstack_pl.data.llava import record_from_llava
from deepstack_pl.data.llava_json import split_json
from deepstack_pl.data.shards import Entry, check_finished, hash_shards, read_index, read_manifest

OPEN_SHARDS = 32  # files that one process keeps open


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
    """The samples of all ``*.tar`` of a folder, in the order of names, read in place.

    Every shard is hashed when the folder is opened, about half a second for 250 MB: the fingerprint is that of the
    bytes that lie there, and a shard that is not the one its manifest lists is refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_finished(folder)
        self.shards = sorted(folder.glob("*.tar"))
        if not self.shards:
            what = "holds no *.tar shards" if folder.is_dir() else "is not there"
            raise ValueError(
                f"{folder} {what}. data=shards reads <data.root>/train/*.tar and <data.root>/val/*.tar: "
                "write them with deepstack_pl.data.shards.ShardWriter, or correct data.root."
            )
        manifest = read_manifest(folder)
        listed = {shard.name for shard in manifest or ()}
        unlisted = [shard.name for shard in self.shards if manifest is not None and shard.name not in listed]
        if unlisted:
            raise ValueError(
                f"{folder}: {', '.join(unlisted[:3])} ({len(unlisted)} in all) not in its manifest.json. "
                "Remove what does not belong, or the manifest if it does."
            )
        digest = hashlib.sha256()
        for shard, found in zip(self.shards, hash_shards(self.shards, manifest), strict=True):
            digest.update(f"{shard.name} {shard.stat().st_size} {found}".encode())
        self._fingerprint = digest.hexdigest()
        self._entries: list[tuple[int, Entry]] = []
        for number, shard in enumerate(self.shards):
            self._entries += ((number, entry) for entry in read_index(shard))
        if not self._entries:
            raise ValueError(f"{folder}: its {len(self.shards)} shards hold no samples. Write them again.")
        self._files = _Files()

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


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """Training and validation source; the fine print set is written first where it is not there yet.

    ``llava_json`` holds records out by a fixed seed, see `llava_json.hold_out`.
    """
    if config.source is Kind.llava_json:
        return split_json(config)
    root = Path(config.root)
    if config.source is Kind.fine_print:
        root = write_fine_print(config.fine_print, root)
    return ShardSource(root / "train"), ShardSource(root / "val")


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
