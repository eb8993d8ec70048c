"""Shards proved: each read whole, and compared with its index and with the manifest."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from deepstack_pl.data.folders import check_listed
from deepstack_pl.data.index import ShardIndex, build_index, shard_of, sidecar
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shards import MANIFEST, ShardInfo, check_finished, list_manifest
from deepstack_pl.data.whole_set import lost_of_set, splits_of_set


@dataclass(slots=True)
class Verified:
    """What was found.

    Attributes:
        written: indexes that were missing and now are there.
        damage: a sentence for everything that is wrong.
        seconds: spent reading.
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    seconds: float = 0.0
    written: list[Path] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def shard_folders(root: Path) -> list[Path]:
    """``root`` if shards lie in it, and those of its folders that hold any, or should.

    Raises:
        ValueError: there are none.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder. Name one that holds shards, or train/ and val/.")
    inside = {*root.iterdir(), *(root / split for split in splits_of_set(root))}
    folders = [root] if any(root.glob("*.tar")) else []
    folders += [folder for folder in sorted(inside) if _is_of_shards(folder) or folder.name in splits_of_set(root)]
    if not folders:
        raise ValueError(f"{root} holds no *.tar shards, nor does a folder in it. Name one that does.")
    return folders


def verify(folders: list[Path], root: Path | None = None) -> Verified:
    """Build the index of every shard from its bytes and compare; write those that are missing. ``root``: of a whole
    set, whose manifest is compared too.

    Nothing is changed of what is there, and damage to one shard keeps no other from being read.
    """
    found = Verified()
    if root is not None:
        found.damage += lost_of_set(root)
    tars = [tar for folder in folders for tar in sorted(folder.glob("*.tar"))]
    with bar("Verifying", sum(tar.stat().st_size for tar in tars), in_bytes=True) as advance:
        for folder in folders:
            listed = _listed(folder, found)
            for name in sorted(listed or ()):
                if not (folder / name).is_file():
                    found.damage.append(f"{folder / name} is not there, but {folder / MANIFEST} lists it. Fetch it.")
            for tar in sorted(folder.glob("*.tar")):
                _verify_shard(tar, listed, found, advance)
            for index in sorted(folder.glob("*.index.npz")):
                if not shard_of(index).exists():
                    found.damage.append(f"{index} is the index of a shard that is not there. Fetch it, or remove both.")
    return found


def _verify_shard(
    tar: Path, listed: dict[str, ShardInfo] | None, found: Verified, advance: Callable[[int], None]
) -> None:
    start = time.perf_counter()
    try:
        index = build_index(tar, advance)
    except (ValueError, OSError) as error:
        found.damage.append(str(error))
        return
    found.seconds += time.perf_counter() - start
    found.shards, found.samples, found.bytes = found.shards + 1, found.samples + len(index), found.bytes + index.bytes
    try:
        if listed is not None and tar.name not in listed:
            raise ValueError(f"{tar} is not in its manifest. Remove it, or the manifest if it belongs there.")
        check_listed(tar, index, listed or {})
        if not sidecar(tar).exists():
            with suppress(OSError):  # of a folder that is only read from: each opening builds it
                index.save(sidecar(tar))
                found.written.append(sidecar(tar))
        elif not index.same_as(ShardIndex.load(sidecar(tar))):
            raise ValueError(
                f"{tar} is not the shard that {sidecar(tar).name} was made of. Fetch or write the shard again; if you "
                "changed it on purpose, remove the index."
            )
    except (ValueError, OSError) as error:
        found.damage.append(str(error))


def _listed(folder: Path, found: Verified) -> dict[str, ShardInfo] | None:
    """What the manifest lists; a shard of another size is found again when it is read."""
    manifest = None
    for check in (check_finished, list_manifest):
        try:
            manifest = check(folder)
        except ValueError as error:
            found.damage.append(str(error))
    return None if manifest is None else {shard.name: shard for shard in manifest}


def _is_of_shards(folder: Path) -> bool:
    traces = ("*.tar", MANIFEST, "*.index.npz", "*.partial")
    return folder.is_dir() and any(any(folder.glob(trace)) for trace in traces)
