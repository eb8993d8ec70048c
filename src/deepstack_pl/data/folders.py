"""Where shards lie: a folder on this machine, or a remote one (`remote`), each shard with the index beside it."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.index import ShardIndex, build_index, sidecar
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shards import MANIFEST, ShardInfo, check_finished, read_manifest


class Folder(Protocol):
    """The shards of one split."""

    @property
    def name(self) -> str:
        """Its last part, for keys and messages."""
        ...

    def shards(self) -> list[ShardIndex]:
        """The indexes of its shards in the order of names, each proved to be that of the shard."""
        ...

    def path(self, shard: str) -> Path:
        """A file on this machine that holds the shard of this name; a remote one is fetched whole first."""
        ...

    def where(self) -> str:
        """For messages."""
        ...


class LocalFolder:
    """All ``*.tar`` of a folder on this machine.

    A shard is taken for the one that its index was made of where size and date of change agree, as git does; where the
    date differs it is hashed again, and where it has no index that is built. Both are written back if the folder may
    be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    def where(self) -> str:
        return str(self.folder)

    def path(self, shard: str) -> Path:
        return self.folder / shard

    def shards(self) -> list[ShardIndex]:
        """As in `Folder`.

        Raises:
            ValueError: no shards, an unfinished folder, a shard that is damaged or is not the one its index or the
                manifest lists.
        """
        check_finished(self.folder)
        tars = sorted(self.folder.glob("*.tar"))
        if not tars:
            what = "holds no *.tar shards" if self.folder.is_dir() else "is not there"
            raise ValueError(
                f"{self.folder} {what}. data=shards reads <data.root>/train/*.tar and <data.root>/val/*.tar: build "
                "them with deepstack shards build, or deepstack_pl.data.shards.ShardWriter, or correct data.root."
            )
        manifest = read_manifest(self.folder)
        listed = {shard.name: shard for shard in manifest or ()}
        unlisted = [tar.name for tar in tars if manifest is not None and tar.name not in listed]
        if unlisted:
            raise ValueError(
                f"{self.folder}: {', '.join(unlisted[:3])} ({len(unlisted)} in all) not in its {MANIFEST}. "
                "Remove what does not belong, or the manifest if it does."
            )
        found = [_read_sidecar(tar) for tar in tars]
        doubtful = [tar for tar, index in zip(tars, found, strict=True) if index is None or not _dated(tar, index)]
        if doubtful:
            found = self._prove(tars, found, listed, doubtful)
        indexes = [index for index in found if index is not None]
        for tar, index in zip(tars, indexes, strict=True):
            check_listed(tar, index, listed)
        return indexes

    def _prove(
        self,
        tars: Sequence[Path],
        found: Sequence[ShardIndex | None],
        listed: dict[str, ShardInfo],
        doubtful: Sequence[Path],
    ) -> list[ShardIndex | None]:
        """Hash the doubtful ones, or build what is not there."""
        proved, again = [], set(doubtful)
        size = sum(tar.stat().st_size for tar in doubtful)
        with bar(f"Reading {len(doubtful)} shards of {self.folder}", size, in_bytes=True) as advance:
            for tar, index in zip(tars, found, strict=True):
                if tar not in again:
                    proved.append(index)
                    continue
                fresh = build_index(tar, advance) if index is None else _hash_again(tar, index, listed, advance)
                check_listed(tar, fresh, listed)
                with suppress(OSError):  # of a folder that is only read from: the next opening reads the shard again
                    fresh.save(sidecar(tar))
                proved.append(fresh)
        return proved


def check_listed(tar: Path, index: ShardIndex, listed: dict[str, ShardInfo]) -> None:
    """Refuse a shard that is not the one of the manifest, where there is one."""
    if tar.name not in listed:
        return
    info = listed[tar.name]
    if info.sha256 != index.sha256:
        raise changed(tar, index.sha256, info.sha256, tar.with_name(MANIFEST))
    if info.samples != len(index):
        raise ValueError(
            f"{tar} holds {len(index)} samples, but its {MANIFEST} says {info.samples}. Remove the manifest."
        )


def changed(tar: Path, found: str, expected: str, by: Path) -> ValueError:
    """The error that names both digests."""
    return ValueError(
        f"{tar} has sha256 {found[:12]}..., but {by} lists it with {expected[:12]}...: it was changed or damaged after "
        "it was written. Fetch or write the shards again; if you changed them on purpose, remove their .index.npz and "
        "the manifest."
    )


def open_folder(root: str, split: str, config: DataConfig | None = None) -> Folder:
    """``root/split``, local or, where ``root`` is a URL, remote with the cache that ``config`` names.

    Raises:
        ValueError: it cannot be opened.
    """
    if "://" not in root:
        return LocalFolder(Path(root) / split)
    from deepstack_pl.data.remote import remote_folder  # fsspec and its schemes, where they are wanted

    return remote_folder(root, split, config or DataConfig())


def _read_sidecar(tar: Path) -> ShardIndex | None:
    path = sidecar(tar)
    if not path.exists():
        return None
    index = ShardIndex.load(path)
    size = tar.stat().st_size
    if index.bytes != size:
        raise ValueError(
            f"{tar} has {size} bytes, but {path.name} is the index of {index.bytes}: it was changed or is cut off. "
            "Fetch or write the shard again; if you changed it on purpose, remove its index."
        )
    return index


def _dated(tar: Path, index: ShardIndex) -> bool:
    return tar.stat().st_mtime_ns == index.mtime_ns


def _hash_again(
    tar: Path, index: ShardIndex, listed: dict[str, ShardInfo], advance: Callable[[int], None]
) -> ShardIndex:
    date, digest = tar.stat().st_mtime_ns, hashlib.sha256()
    with tar.open("rb") as file:
        while data := file.read(2**22):
            digest.update(data)
            advance(len(data))
    found = digest.hexdigest()
    if found != index.sha256:
        by = tar.with_name(MANIFEST) if tar.name in listed else sidecar(tar)
        raise changed(tar, found, index.sha256, by)
    return replace(index, mtime_ns=date)
