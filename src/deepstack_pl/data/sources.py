"""Where records come from: shards read through their index, or one LLaVA-format JSON file and a folder of images.

A source is random access (the order is made in `stream`), travels to worker processes, and has a fingerprint that
changes when its data does. A record that cannot be trained on is `Refused` by name; what is wrong with the world is a
ValueError or an OSError. Nothing is left out.
"""

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from deepstack_pl.batch import Reason, Record, Refused
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.fine_print import write_fine_print
from deepstack_pl.data.folders import Folder, LocalFolder, open_folder
from deepstack_pl.data.index import ShardIndex, image_members
from deepstack_pl.data.llava import check_turns, record_from_llava
from deepstack_pl.data.llava_json import split_json
from deepstack_pl.data.records import Outline, Source
from deepstack_pl.data.shards import MANIFEST
from deepstack_pl.data.whole_set import check_set
from deepstack_pl.vision.images import decode_image

OPEN_SHARDS = 32  # files that one process keeps open


class ShardSource:
    """The samples of all shards of a folder, in the order of names, read in place through their indexes.

    The fingerprint is that of the shards' names and bytes; every member that is read is checked against its CRC-32.
    ``name`` is the source of records whose path names none.
    """

    def __init__(self, folder: Folder | Path, name: str = "") -> None:
        self.folder = LocalFolder(folder) if isinstance(folder, Path) else folder
        self.shards = self.folder.shards()
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        if not len(self):
            raise ValueError(f"{self.folder.where()}: its {len(self.shards)} shards hold no samples. Write them again.")
        parts = (shard.columns for shard in self.shards)
        self._columns = Columns.concatenate(
            [replace(part, sources=tuple(source or name for source in part.sources)) for part in parts]
        )
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.bytes} {shard.sha256}".encode())
        self._fingerprint = digest.hexdigest()
        self._files = _Files(self.folder.path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Record:
        shard, sample = self._place(index)
        key, members = self._key(shard, sample), shard.members(sample)
        values = self._json(shard, members["json"], key)
        images = [
            decode_image(self._read(shard, member, f"{key}.{extension}"), f"{key}.{extension}")
            for extension, member in image_members(members)
        ]
        source = self._columns.sources[self._columns.source[index]]
        return record_from_llava(values, images, key, source)

    def key(self, index: int, /) -> str:
        return self._key(*self._place(index))

    def outline(self, index: int, /) -> Outline:
        shard, sample = self._place(index)
        key, members = self._key(shard, sample), shard.members(sample)
        values = self._json(shard, members["json"], key)
        sizes = []
        for extension, member in image_members(members):
            if not shard.width[member]:
                raise Refused(Reason.image, f"{key}.{extension}: no picture. Fetch it again, or leave its record out.")
            sizes.append((int(shard.width[member]), int(shard.height[member])))
        return Outline(key, check_turns(values, len(sizes), key), tuple(sizes))

    def stored(self, index: int, /) -> tuple[bytes, list[bytes]]:
        shard, sample = self._place(index)
        members = shard.members(sample)
        places = [members["json"], *(member for _, member in image_members(members))]
        record, *images = (
            self._files.read(shard.name, int(shard.offset[place]), int(shard.size[place])) for place in places
        )
        return record, images

    @property
    def columns(self) -> Columns:
        return self._columns

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def parts(self) -> dict[str, str]:
        return {f"{self.folder.name}/{shard.name}": shard.sha256[:16] for shard in self.shards}

    def describe(self) -> str:
        unread: Counter[str] = Counter()
        for shard in self.shards:
            counts = np.bincount(shard.extension, minlength=len(shard.extensions))
            for extension, count in zip(shard.extensions, counts, strict=True):
                if extension != "json" and not image_members({extension: 0}):
                    unread[extension] += int(count)
        line = f"{len(self):,} samples in {len(self.shards)} shards of {self.folder.where()}"
        left = ", ".join(f"{count:,} .{extension}" for extension, count in sorted(unread.items()))
        return f"{line}; members that are not read: {left}" if left else line

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        return shard, index - int(self._ends[number]) + len(shard)

    def _key(self, shard: ShardIndex, sample: int) -> str:
        return f"{self.folder.name}/{shard.name}:{shard.key(sample)}"

    def _json(self, shard: ShardIndex, member: int, key: str) -> dict[str, Any]:
        try:
            return json.loads(self._read(shard, member, f"{key}.json"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{key}: its json cannot be read ({error}). Write the shard again.") from error

    def _read(self, shard: ShardIndex, member: int, what: str) -> bytes:
        data = self._files.read(shard.name, int(shard.offset[member]), int(shard.size[member]))
        if crc32(data) != shard.crc[member]:
            raise Refused(
                Reason.changed,
                f"{what}: its bytes are not those of the index (CRC-32): the shard was damaged or changed after it was "
                "opened, or on its disk. Run deepstack shards verify, and fetch or write the shard again.",
            )
        return data


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """Training and validation source; the fine print set is written first where it is not there yet.

    ``llava_json`` and `shards build` hold records out by a fixed seed, see `llava_json.hold_out`.

    Raises:
        ValueError: what is configured is not there, or is not what it was.
    """
    if config.source is Kind.llava_json:
        return split_json(config)
    name, root = "", config.root
    if config.source is Kind.fine_print:
        root = str(write_fine_print(config.fine_print, Path(config.root)))
    elif config.source is Kind.corpus:
        name, root = config.name, built_corpus(config)
    elif config.mixture:
        from deepstack_pl.data.mixture import open_mixture  # which needs ShardSource

        held_out = root if "://" in root or (Path(root) / "val").is_dir() else config.mixture[0].root
        return open_mixture(config), ShardSource(open_folder(held_out, "val", config))
    made_of = {} if "://" in root else check_set(Path(root))
    if config.source is Kind.corpus:
        _require_made_of(made_of, config, root)
    name = name or made_of.get("name", "")
    train, val = (ShardSource(open_folder(root, split, config), name) for split in ("train", "val"))
    return train, val


def _require_made_of(made_of: dict[str, Any], config: DataConfig, root: str) -> None:
    """What a set was built with is not ignored where the run says otherwise."""
    here = {"val_samples": config.val_samples, "name": config.name}
    for key, value in here.items():
        if key in made_of and made_of[key] != value:
            raise ValueError(
                f"data.{key}={value}, but the shards in {root} were built with {made_of[key]}: what is held out was "
                f"drawn when they were built. Say data.{key}={made_of[key]}, or build another set: data.shards=FOLDER."
            )


def shards_root(config: DataConfig) -> str:
    """Where a corpus's shards are, or are to be."""
    return config.shards or str(Path(config.root) / "shards" / config.name)


def built_corpus(config: DataConfig) -> str:
    """`shards_root`, which has to be there.

    Raises:
        ValueError: it is not; says how to build it.
    """
    root = shards_root(config)
    if "://" in config.root:
        raise ValueError(
            f"data.root={config.root}: a corpus is built on this machine. Remote shards: data=shards data.root=URL."
        )
    if "://" not in root and not (Path(root) / MANIFEST).is_file():
        shards = f" data.shards={config.shards}" if config.shards else ""
        raise ValueError(
            f"{root} holds no finished shards of {config.name}. Build them once: "
            f"deepstack shards build data={config.name} data.root={config.root}{shards}"
        )
    return root


class _Files:
    """Open shards of one process, read by position; a forked or pickled copy opens its own."""

    def __init__(self, path: Callable[[str], Path]) -> None:
        self._path = path
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._owner = os.getpid()

    def read(self, shard: str, start: int, size: int) -> bytes:
        if self._owner != os.getpid():
            self._close()
            self._owner = os.getpid()
        if shard not in self._open:
            self._open[shard] = self._path(shard).open("rb", buffering=0)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard].fileno(), size, start)
        if len(data) != size:
            raise ValueError(
                f"{shard}: {len(data)} bytes at {start}, not {size}: the shard changed while it was in use. Fetch or "
                "write it again."
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_open": OrderedDict(), "_owner": 0}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
