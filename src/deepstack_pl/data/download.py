"""Remote files as streams of bytes: opened again where they break off, and never quietly short.

fsspec opens http(s), hf, s3, gs and what else it has a backend for; gs goes through gsutil where gcsfs is missing.
"""

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import fsspec
from fsspec.core import url_to_fs
from webdataset.gopen import gopen_gsutil

TRIES = 3  # without a byte of progress
WAIT = 1.0  # seconds before the second try, and twice as long before each one after it
SMALL = 256 * 2**20  # bytes of a manifest or an index, at most
TIMEOUT = 60.0  # seconds without a byte, over HTTP

_HTTP = ("http://", "https://")
_Found = TypeVar("_Found")


class _Stream(Protocol):
    def read(self, count: int, /) -> bytes: ...

    def close(self) -> None: ...


class Unreachable(OSError):
    """A remote file that could not be read; the sentence names it, what was found and the remedy."""


class NotThere(Unreachable):
    """The server is there, the file is not."""


def shown(url: str) -> str:
    """``url`` for messages and digests: without a password or a signature."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def check_url(url: str) -> None:
    """Refuse what cannot be opened here, before anything is.

    Raises:
        ValueError: a scheme that nothing here reads, or one whose package is not installed.
    """
    scheme = urlsplit(url).scheme
    if scheme == "pipe" or "::" in url:
        raise ValueError(
            f"{shown(url)}: commands and chained addresses are not run from a configuration. Give the address itself: "
            "http(s)://, hf://, s3://, gs:// or a path."
        )
    if _by_gsutil(url):
        return
    try:
        fsspec.get_filesystem_class(scheme or "file")
    except ImportError as error:
        other = ", or the command gsutil" if scheme == "gs" else ""
        raise ValueError(f"{shown(url)}: {scheme}:// needs a package that is missing ({error}){other}.") from error
    except ValueError as error:
        raise ValueError(
            f"{shown(url)}: {error}. Use http(s)://, hf://, s3://, gs:// or a path, or install fsspec's package for it."
        ) from error


def remote_size(url: str) -> int:
    """Bytes of the file.

    Raises:
        Unreachable: after `TRIES` tries; also where the server does not say.
    """

    def ask() -> int | None:
        if _by_gsutil(url):
            told = subprocess.run(["gsutil", "du", url], capture_output=True, text=True, check=True)
            return int(told.stdout.split()[0])
        system, path = _filesystem(url)
        return system.info(path)["size"]

    size = _retry(url, ask)
    if size is None:
        raise Unreachable(
            f"{shown(url)}: the server does not say how long the file is, so that a cut could not be told from its "
            "end. Serve it by one that sends Content-Length."
        )
    return size


def read_small(url: str) -> bytes:
    """All bytes of a small file.

    Raises:
        Unreachable: after `TRIES` tries; `NotThere` at once.
        ValueError: it has more than `SMALL` bytes.
    """
    size = remote_size(url)
    require_small(url, size)
    with Download(url, size) as download:
        return download.read(size)


def require_small(url: str, size: int) -> None:
    """Refuse what is too large to be held in memory whole.

    Raises:
        ValueError: it has more than `SMALL` bytes.
    """
    if size > SMALL:
        raise ValueError(
            f"{shown(url)} has {size:,} bytes, where a small file of at most {SMALL:,} is expected. See that the "
            "address is right."
        )


class Download:
    """The ``size`` bytes of ``url`` from front to back; where the connection breaks it goes on at the same byte."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0
        self._stream: _Stream | None = None

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer only at the end.

        Raises:
            Unreachable: no byte in `TRIES` tries.
        """
        parts = []
        end = min(self.at + count, self.size)
        while self.at < end:
            parts.append(_retry(self.url, lambda: self._once(end - self.at)))
            self.at += len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _once(self, count: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = _open(self.url)
                passed = 0
                while passed < self.at:
                    passed += len(self._next(min(2**20, self.at - passed), passed))
            return self._next(count, self.at)
        except Exception:
            self.close()
            raise

    def _next(self, count: int, at: int) -> bytes:
        assert self._stream is not None
        data = self._stream.read(count)
        if not data:
            raise EOFError(f"it ended at byte {at:,} of {self.size:,}")
        return data


def _by_gsutil(url: str) -> bool:
    if not url.startswith("gs://") or importlib.util.find_spec("gcsfs") is not None:
        return False
    return shutil.which("gsutil") is not None


def _filesystem(url: str) -> tuple[Any, str]:
    options = {}
    if url.startswith(_HTTP):  # fsspec would give up after five minutes, however well it goes
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return url_to_fs(url, **options)


def _open(url: str) -> _Stream:
    if _by_gsutil(url):
        return gopen_gsutil(url)
    system, path = _filesystem(url)
    if url.startswith(_HTTP):
        return system.open(path, "rb", block_size=0, size=1)  # one stream; with a size it is not asked for first
    if url.startswith("hf://"):
        return system.open(path, "rb", block_size=0)
    return system.open(path, "rb")


def _retry(url: str, act: Callable[[], _Found]) -> _Found:
    failed = 0
    while True:
        try:
            return act()
        except Exception as error:  # backends raise whatever they stumble over
            cause: BaseException = error
            if isinstance(error, FileNotFoundError) and url.startswith(_HTTP) and error.__cause__ is not None:
                cause = error.__cause__  # fsspec calls whatever goes wrong with the length a file that is not found
            status = cause.status if isinstance(cause, aiohttp.ClientResponseError) else 0
            missing = isinstance(cause, FileNotFoundError) or status in (404, 410)
            failed += 1
            if missing:
                remedy = "Correct the address, or upload it."
                raise NotThere(f"{shown(url)}: there is no such file ({_told(cause)}). {remedy}") from error
            if failed == TRIES or (400 <= status < 500 and status not in (408, 429)):
                raise Unreachable(
                    f"{shown(url)}: {_told(cause)}, at try {failed}. See that the server is up and lets you in, and "
                    "start again; whole shards that were fetched are kept."
                ) from error
        time.sleep(WAIT * 2 ** (failed - 1))


def _told(error: BaseException) -> str:
    """What was found, in a few words."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the server answered {error.status} {error.message}"
    if isinstance(error, TimeoutError):
        return f"no byte for {TIMEOUT:g} s"
    if isinstance(error, FileNotFoundError):
        return "404" if str(error).startswith(_HTTP) else "not found"
    if isinstance(error, EOFError):
        return str(error)
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode(errors="replace")
        return f"gsutil: {said.strip()[-200:]}"
    return f"{type(error).__name__}: {error}"
