"""Tar archives read strictly: every member in place, or a refusal that names the place.

Python's tarfile takes a damaged header in the middle of an archive for its end, and a reader that trusts it loses the
rest of a shard in silence. This one reads plain files of USTAR archives, with the long names that GNU and PAX write.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_MEMBER = 2**30  # bytes; a header that asks for more is damaged, or means harm
_ZEROS = bytes(BLOCK)
_FETCH = "Fetch or write the shard again."
_PLAIN = "Write the shard again from plain files."


class Member(NamedTuple):
    """One file of an archive: its name as it stands there, where its bytes start, and these."""

    name: str
    start: int
    data: bytes


def refusal(shard: Path, member: str | None, what: str, remedy: str) -> ValueError:
    """The error that names ``shard`` and, where it is about one, the member."""
    return ValueError(f"{shard}: {f'member {member} ' if member else ''}{what}. {remedy}")


def read_members(shard: Path, file: BinaryIO, length: int, seen: Callable[[bytes], object]) -> Iterator[Member]:
    """Every file among the ``length`` bytes of ``file``, in order; all bytes pass through ``seen`` once, also in order.

    Raises:
        ValueError: not a whole archive of plain files; names ``shard``, the member and the byte.
    """
    if not length or length % BLOCK:
        raise refusal(shard, None, f"{length} bytes are no whole number of {BLOCK}-byte blocks: it is cut off", _FETCH)
    at, last, long_name = 0, None, None

    def take(size: int) -> bytes:
        data = file.read(size)
        if len(data) != size:
            raise refusal(shard, last, f"is the last that can be read: the file ends before byte {at + size}", _FETCH)
        seen(data)
        return data

    while at < length:
        header = take(BLOCK)
        if header == _ZEROS:
            break
        kind, size, name = _read_header(shard, header, at, last)
        at += BLOCK
        name = name if long_name is None else long_name
        last = name if name.isprintable() else repr(name)
        padded = -(-size // BLOCK) * BLOCK
        if at + padded > length:
            raise refusal(shard, last, f"ends at byte {at + padded}, beyond the file's {length}", _FETCH)
        if size > MAX_MEMBER:
            raise refusal(shard, last, f"has {size} bytes; at most {MAX_MEMBER:,} are read", _PLAIN)
        data = take(padded)
        if kind in b"Lxg":
            long_name = _long_name(shard, last, kind, data[:size])
        else:
            _check(shard, kind, name, last)
            if kind != b"5":
                yield Member(name, at, data[:size])
            long_name = None
        at += padded
    if length - at < 2 * BLOCK or take(BLOCK) != _ZEROS:
        raise refusal(shard, last, f"is followed at byte {at} by no end-of-archive marker", _FETCH)
    end, at = at, at + 2 * BLOCK
    while at < length:
        rest = take(min(2**20, length - at))
        at += len(rest)
        if rest.strip(b"\0"):
            raise refusal(shard, last, f"is followed by the end of the archive at byte {end}, then by more", _FETCH)


def _read_header(shard: Path, header: bytes, at: int, last: str | None) -> tuple[bytes, int, str]:
    """Type, size and name."""
    try:
        if sum(header) - sum(header[148:156]) + 8 * 32 != int(header[148:156].rstrip(b"\0 "), 8):
            raise ValueError("its checksum does not match")
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        if size < 0:
            raise ValueError(f"its size is {size}")
    except ValueError as error:
        what = f"is the last member that can be read: no header at byte {at} ({error})"
        raise refusal(shard, last or "(none)", what, _FETCH) from error
    name = header[:100].rstrip(b"\0").partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return header[156:157], size, _text(shard, prefix + b"/" + name if prefix else name)


def _long_name(shard: Path, member: str, kind: bytes, data: bytes) -> str | None:
    """The next member's name from a header of its own."""
    if kind == b"L":
        name = data.partition(b"\0")[0]
        if not name:
            raise refusal(shard, member, "is a long name that is empty", _FETCH)
        return _text(shard, name)
    found = None
    if not data.strip(b"\0"):
        raise refusal(shard, member, "is an extended header that holds nothing", _FETCH)
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise refusal(shard, member, "is an extended header that cannot be read", _FETCH)
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"size" or key.startswith(b"GNU.sparse") or (kind == b"g" and key == b"path"):
            raise refusal(shard, member, f"is an extended header that sets {key.decode('ascii', 'replace')}", _PLAIN)
        if key == b"path":
            found = _text(shard, value)
        data = data[int(length) :]
    return found


def _text(shard: Path, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise refusal(shard, repr(name), "has a name that is not UTF-8", _PLAIN) from error


def _check(shard: Path, kind: bytes, name: str, shown: str) -> None:
    if kind not in (b"0", b"\0", b"5", b"7"):
        raise refusal(shard, shown, "is a link, a device or sparse, not a plain file", _PLAIN)
    if name.startswith("/") or ".." in name.split("/"):
        raise refusal(shard, shown, "leaves the archive's folder", _PLAIN)
    if not name.isprintable():
        raise refusal(shard, shown, "has a name with control characters", _PLAIN)
