"""Remote shards, whole, on a local disk: each fetched once, proved by its digest, and thrown out when others need room.

A file of the cache is named by a digest of its address and content, never by a name that stands in data. It is written
as ``*.partial``, locked by the process that writes it, and renamed when its size and SHA-256 are those of the manifest.
The lock dies with its process; what it leaves is swept by the next. Files that a reader has open outlive their removal.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import torch.utils.data

from deepstack_pl.data.download import Download, Unreachable, remote_size, require_small, shown
from deepstack_pl.data.progress import bar

RESERVE = 2**30  # bytes of the disk that the cache leaves to others
GRACE = 5.0  # seconds within which a file that was handed out is not removed: its reader is about to open it
POLL = 0.2  # seconds between looks at whether others have made room
PROGRESS = 32 * 2**20  # bytes from which a download shows a bar
CHUNK = 2**22


class ShardCache:
    """A folder of at most ``limit_bytes`` that several processes share; safe to hand to workers."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def fetch(self, url: str, sha256: str, size: int) -> Path:
        """A local file with the ``size`` bytes of ``url`` whose digest is ``sha256``; open it at once.

        Raises:
            ValueError: it does not fit into the cache, or what came is not what the digest says.
            OSError: the server, after several tries, or the cache's disk; names which.
        """
        return self._fetch(url, f"{shown(url)} {sha256}", size, sha256)

    def fetch_small(self, url: str, version: str) -> Path:
        """The same for a file without a digest of its own, kept for ``version`` of it; who reads it checks it."""
        return self._fetch(url, f"{shown(url)} {version} small", None, None)

    def _fetch(self, url: str, identity: str, size: int | None, sha256: str | None) -> Path:
        entry = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.kept"
        try:
            if _hand_out(entry, size):
                return entry
            if size is None:
                size = remote_size(url)
                require_small(url, size)
            if size > self.limit_bytes:
                raise ValueError(
                    f"{shown(url)} has {_gigabytes(size)}, but data.cache_gb allows the whole cache "
                    f"{_gigabytes(self.limit_bytes)}. Raise data.cache_gb to several shards or more."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._claim(entry, size) as file:
                if file is not None:
                    file.truncate(0)  # a dead process may have left it full
                    self._make_room(file, size, shown(url))
                    self._fill(file, url, size, sha256)
                    os.replace(_partial(entry), entry)
                    _sync_folder(self.folder)
        except Unreachable:
            raise
        except OSError as error:
            raise OSError(
                f"The cache {self.folder} cannot take {shown(url)}: {error}. Point data.cache at a folder on a local "
                "disk that can be written to and has room."
            ) from error
        return entry

    @contextmanager
    def _claim(self, entry: Path, size: int) -> Iterator[BinaryIO | None]:
        """The file to fill, this process's alone; None where another process has filled it meanwhile."""
        partial = _partial(entry)
        while not _hand_out(entry, size):
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # waits for whoever is fetching it
                if not _is_at(file, partial):
                    continue  # it was renamed, or swept, while we waited
                try:
                    if _hand_out(entry, size):  # renamed between our look and our opening
                        break
                    yield file
                    return
                finally:
                    if _is_at(file, partial):
                        partial.unlink()
        yield None

    def _make_room(self, file: BinaryIO, size: int, what: str) -> None:
        """Throw out what was used longest ago until ``size`` bytes fit, and reserve them for ``file``.

        What was handed out a moment ago, and what others are fetching, is waited for.
        """
        while True:
            with open(self.folder / "lock", "a+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                fetching = self._sweep()
                kept = sorted((_stat(path), path) for path in self.folder.glob("*.kept"))
                used = fetching + sum(stat[1] for stat, _ in kept)
                for (used_at, entry_size), path in kept:
                    if not self._lacks(used, size):
                        break
                    if abs(time.time() - used_at) > GRACE and _stat(path)[0] == used_at:
                        path.unlink(missing_ok=True)
                        used -= entry_size
                lacks = self._lacks(used, size)
                if not lacks:
                    _reserve(file, size)
                    return
            if not used:
                raise ValueError(f"{what}: {lacks}, and nothing in {self.folder} can be thrown out.")
            time.sleep(POLL)

    def _lacks(self, used: int, size: int) -> str:
        """What there is not enough of for ``size`` more bytes; empty where there is."""
        if used + size > self.limit_bytes:
            return f"data.cache_gb allows {_gigabytes(self.limit_bytes)}, and {_gigabytes(used)} are in use"
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE:
            return (
                f"its {_gigabytes(size)} and a reserve of {_gigabytes(RESERVE)} do not fit into the "
                f"{_gigabytes(free)} that are free on the cache's disk. Free some, or point data.cache elsewhere"
            )
        return ""

    def _sweep(self) -> int:
        """Remove what dead processes left; the bytes that living ones are fetching."""
        fetching = 0
        for partial in self.folder.glob("*.partial"):
            try:
                file = partial.open("r+b")
            except FileNotFoundError:  # its process has just renamed or removed it
                continue
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fetching += os.fstat(file.fileno()).st_size
                    continue
                if _is_at(file, partial):
                    partial.unlink()
        return fetching

    def _fill(self, file: BinaryIO, url: str, size: int, sha256: str | None) -> None:
        main_process = torch.utils.data.get_worker_info() is None  # bars of several workers would write into each other
        shows = size > PROGRESS and main_process
        with bar(f"Fetching {shown(url)}", size, in_bytes=True) if shows else nullcontext(_ignore) as advance:
            found = _copy(file, url, size, advance)
            if sha256 is not None and found != sha256:
                found = _copy(file, url, size, _ignore)  # right this time if it was damaged on the way, not there
        if sha256 is not None and found != sha256:
            raise ValueError(
                f"{shown(url)}: what came has sha256 {found[:12]}..., but its manifest lists {sha256[:12]}...: it was "
                "replaced after the manifest was written, or is damaged. Upload the shard and its manifest again."
            )
        os.fsync(file.fileno())


def _partial(entry: Path) -> Path:
    return entry.with_suffix(".partial")


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the disk's blocks now, so that they count as used, and a full disk is told before the download."""
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(file.fileno(), size)


def _hand_out(entry: Path, size: int | None) -> bool:
    """Whether it is there, whole; the date of change tells when it was last asked for."""
    try:
        if size is not None and entry.stat().st_size != size:
            entry.unlink()  # a disk that lost its end; it is fetched again
            return False
        os.utime(entry)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return entry.exists()  # a cache that is only read from: nothing is thrown out of it either
    return True


def _stat(path: Path) -> tuple[float, int]:
    """When it was last asked for, and its bytes; nothing of one that is being removed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0.0, 0
    return stat.st_mtime, stat.st_size


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _copy(file: BinaryIO, url: str, size: int, advance: Callable[[int], object]) -> str:
    """Fill ``file``; the SHA-256 of what came."""
    file.seek(0)
    digest = hashlib.sha256()
    with Download(url, size) as download:
        while data := download.read(CHUNK):
            digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            advance(len(data))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _ignore(_bytes: int) -> None:
    """In place of a bar."""
