"""Shards behind a URL: a manifest and small indexes are read at once, each shard when its first sample is.

``ROOT/train/manifest.json`` lists the shards with their size and digest, and ``ROOT/train/shard-000000.index.npz`` lies
beside each: what `deepstack shards build` and `verify` write, uploaded as it is.
"""

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from deepstack_pl.data.cache import ShardCache
from deepstack_pl.data.config import DataConfig, Shuffle
from deepstack_pl.data.download import NotThere, check_url, read_small, shown
from deepstack_pl.data.index import INDEX_VERSION, ShardIndex, sidecar
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shards import MANIFEST, ShardInfo

_AT_ONCE = 8  # indexes that are fetched side by side
_UPLOAD = (
    "Upload the folder that deepstack shards build wrote as it is, manifest.json and every .index.npz beside the tars "
    "(deepstack shards verify writes the indexes of older shards), or stream the tars alone: data.stream=webdataset "
    "data.urls=..."
)


class RemoteFolder:
    """The shards of ``root/split``, as in `folders.Folder`; those that are read are kept in ``cache``."""

    def __init__(self, root: str, split: str, cache: ShardCache) -> None:
        check_url(root)
        self.url, self.name, self.cache = f"{root.rstrip('/')}/{split}", split, cache
        self.infos = {info.name: info for info in _read_manifest(f"{self.url}/{MANIFEST}")}

    def where(self) -> str:
        return shown(self.url)

    def path(self, shard: str) -> Path:
        """The shard's file in the cache, fetched where it is not there; to be opened at once."""
        info = self.infos[shard]
        return self.cache.fetch(f"{self.url}/{shard}", info.sha256, info.bytes)

    def shards(self) -> list[ShardIndex]:
        """The indexes, in the order of names, each proved to be that of the shard in the manifest.

        Raises:
            ValueError: an index is not there, cannot be read, or is that of other bytes.
        """
        names = sorted(self.infos)
        with (
            bar(f"Fetching {len(names)} indexes of {self.where()}", len(names)) as advance,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            indexes = []
            for index in pool.map(self._index, names):
                indexes.append(index)
                advance(1)
        return indexes

    def _index(self, shard: str) -> ShardIndex:
        info, url = self.infos[shard], f"{self.url}/{sidecar(Path(shard)).name}"
        try:
            file = self.cache.fetch_small(url, f"{info.sha256} {INDEX_VERSION}")
        except NotThere as error:
            raise ValueError(f"{error} {_UPLOAD}") from error
        try:
            index = replace(ShardIndex.load(file), name=shard)
        except ValueError as error:
            file.unlink(missing_ok=True)  # the next start fetches it again
            raise ValueError(f"{shown(url)}: {error} {_UPLOAD}") from error
        if (index.bytes, index.sha256, len(index)) != (info.bytes, info.sha256, info.samples):
            file.unlink(missing_ok=True)
            raise ValueError(
                f"{shown(url)} is the index of {len(index)} samples in {index.bytes} bytes with sha256 "
                f"{index.sha256[:12]}..., but {MANIFEST} lists {info.samples} in {info.bytes} with "
                f"{info.sha256[:12]}... {_UPLOAD}"
            )
        return index


def remote_folder(root: str, split: str, config: DataConfig) -> RemoteFolder:
    """``root/split`` with the cache that ``config`` names; of training shards, see `check_order`."""
    cache = ShardCache(Path(config.cache), int(config.cache_gb * 1e9))
    folder = RemoteFolder(root, split, cache)
    if split == "train":
        check_order(list(folder.infos.values()), config)
    return folder


def check_order(shards: Sequence[ShardInfo], config: DataConfig) -> None:
    """Refuse an order in which whole shards would be fetched over and over for a few samples of each.

    Raises:
        ValueError: the cache holds less than all ``shards``, and either the shuffle is full, or its blocks are smaller
            than a shard, or its window spans more shards than the cache holds.
    """
    limit, total = int(config.cache_gb * 1e9), sum(shard.bytes for shard in shards)
    if total <= limit:
        return
    each = math.ceil(sum(shard.samples for shard in shards) / len(shards))
    largest = max(shard.bytes for shard in shards)
    per_block = math.ceil(config.block / max(each, 1)) + 1  # a block seldom starts where a shard does
    spanned = per_block * (math.ceil(config.window / config.block) + 1)  # nor a window where a block does
    blocks = f"data.shuffle=blocks data.block={each} data.window={2 * each}"
    least = f"{6 * largest / 1e9:.3g}"
    all_of_them = f"data.cache_gb={math.ceil(total / 1e9)} or more, if the disk has it"
    holds = f"{len(shards)} shards of {total / 1e9:.3g} GB, and a cache of data.cache_gb={config.cache_gb:g}"
    if config.shuffle is Shuffle.full:
        raise ValueError(
            f"{holds}: with data.shuffle=full nearly every sample would fetch a whole shard again. Use {blocks}, which "
            f"reads shard after shard (data.cache_gb={least} is enough), or {all_of_them}."
        )
    if config.block < each:
        raise ValueError(
            f"{holds}: data.block={config.block} is less than the {each} samples of a shard, which would be fetched "
            f"again for each of its blocks. Use {blocks}, or {all_of_them}."
        )
    if spanned * largest > limit:
        raise ValueError(
            f"{holds}: data.window={config.window} with data.block={config.block} spans up to {spanned} shards, "
            f"{spanned * largest / 1e9:.3g} GB. Use {blocks} with data.cache_gb={least} or more, or {all_of_them}."
        )


def _read_manifest(url: str) -> list[ShardInfo]:
    try:
        data = read_small(url)
    except NotThere as error:
        raise ValueError(f"{error} {_UPLOAD}") from error
    try:
        shards = [ShardInfo(**values) for values in json.loads(data)["shards"]]
        for shard in shards:
            _check_listed(shard)
        if len({shard.name for shard in shards}) != len(shards) or not shards:
            raise ValueError(f"{len(shards)} shards, names used once")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{shown(url)} is no manifest of shards ({error}). {_UPLOAD}") from error
    return shards


def _check_listed(shard: ShardInfo) -> None:
    """Names become parts of addresses, so they are names and nothing more."""
    told = (shard.name, shard.sha256, shard.bytes, shard.samples)
    if not all(isinstance(value, kind) for value, kind in zip(told, (str, str, int, int), strict=True)):
        raise TypeError(f"a shard as {told}")
    if not re.fullmatch(r"[\w-][\w.-]*\.tar", shard.name, re.ASCII):
        raise ValueError(f"shard {shard.name!r}: no plain name")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256) or shard.bytes < 1 or shard.samples < 0:
        raise ValueError(f"{shard.name} with sha256 {shard.sha256!r}, {shard.bytes} bytes, {shard.samples} samples")
