"""Checkpoints on disk: which there are, which are whole, which go. Loads without torch.

``FOLDER/step-00000100/`` holds ``manifest.json`` (all other files with their sizes and SHA-256) and is renamed into
place when it is complete; ``FOLDER/latest`` names the newest. What is being written or removed is called
``NAME.tmp-HOST-PID-RANDOM``. Times of files say nothing: they change when files are copied.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

LATEST, MANIFEST = "latest", "manifest.json"
METADATA, PLAIN, MINE = ".metadata", "run.pt", "process-{}.pt"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"\.metadata|[\w-]+(\.[\w-]+)+", re.ASCII)  # none lies elsewhere
_MARK = ".tmp-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is in its place and whose manifest is sound; its other files have not been looked at.

    Attributes:
        step: optimiser steps that were made.
        manifest: ``version``, ``step``, ``world`` (processes that saved it), ``facts`` (what the run said of itself),
            ``files`` ({name: {"bytes", "sha256"}}), ``digest`` (of all that).
    """

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file["bytes"] for file in self.manifest["files"].values())


def name_of(step: int) -> str:
    """The folder of the checkpoint of ``step``."""
    return f"step-{step:08}"


def all_of(folder: Path) -> list[Checkpoint]:
    """The checkpoints in ``folder`` with a sound manifest, newest first."""
    return [found for found in _places(folder) if isinstance(found, Checkpoint)]


def verify(checkpoint: Checkpoint, *, share: tuple[int, int] = (0, 1), deep: bool = True) -> list[str]:
    """What is wrong with its files, a few words each; empty where nothing is.

    Sizes are compared, and digests: of small files always, of files of tensors where ``deep``. ``share`` is (rank,
    world): the digests of every world-th file of tensors alone, so that processes divide them among themselves.
    """
    problems = []
    rank, world = share
    files = sorted(checkpoint.manifest["files"].items())
    large = [name for name, _ in files if name.endswith(".distcp")]
    hashed = set(large[rank::world] if deep else ()) | {name for name, _ in files if name not in large}
    for name, expected in files:
        try:
            size = (checkpoint.folder / name).stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{name} has {size} bytes, not {expected['bytes']}")
            elif name in hashed and sha256(checkpoint.folder / name) != expected["sha256"]:
                problems.append(f"{name} is not what was written (another SHA-256)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest(folder: Path, *, deep: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest that verifies, and a sentence for each newer one that was passed over."""
    passed = []
    for found in _places(folder):
        if isinstance(found, Checkpoint):
            problems = verify(found, deep=deep)
            if not problems:
                return found, passed
            passed.append(f"{found.folder} is damaged and passed over: {'; '.join(problems[:3])}.")
        else:
            passed.append(f"{found[0]} is damaged and passed over: {found[1]}.")
    return None, passed


def sha256(file: Path) -> str:
    """The digest of what ``file`` holds."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """``manifest.json``: ``manifest`` and its digest."""
    plain = json.loads(json.dumps(manifest))  # keys that are numbers become words before the digest is taken
    return json.dumps({**plain, "digest": _digest(plain)}, indent=1).encode()


def aside(folder: Path, name: str) -> Path:
    """A name in ``folder`` that nothing else has, for what is not yet or no longer called ``name``; it tells whose."""
    return folder / f"{name}{_MARK}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def sweep(folder: Path) -> None:
    """Remove what was being written or removed when its process ended; of this machine's processes that live on,
    nothing. This process must not be writing there.
    """
    for path in folder.glob(f"*{_MARK}*-*-*"):
        host, pid, _ = path.name.split(_MARK)[-1].rsplit("-", 2)
        # this process's own number: of an earlier one, as containers give the same again
        lives = host == socket.gethostname() and pid.isdigit() and int(pid) != os.getpid() and _lives(int(pid))
        if not lives:
            _delete(path)


def remember(folder: Path, name: str) -> None:
    """Make the checkpoint ``name`` the one that ``folder/latest`` names."""
    draft = aside(folder, LATEST)
    try:
        write_through(draft, f"{name}\n".encode())
        draft.replace(folder / LATEST)
    finally:
        draft.unlink(missing_ok=True)
    sync(folder)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep``. Those of later steps than ``latest`` go too: they are damaged, or of a way
    that the run has left by going on from an earlier one.

    Raises:
        ValueError: ``keep`` is less than 2: the last one may turn out to be damaged.
    """
    require_keep(keep)
    there = all_of(folder)
    names = [checkpoint.folder.name for checkpoint in there]
    latest = _latest(folder)
    first = names.index(latest) if latest in names else 0
    for checkpoint in [*there[:first], *there[first + keep :]]:
        discard(checkpoint.folder)


def require_keep(keep: int) -> None:
    """Refuse to keep fewer than two.

    Raises:
        ValueError: it is.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: of two checkpoints one may turn out to be damaged. Keep 2 or more.")


def discard(path: Path) -> None:
    """Remove a checkpoint: the name first, so that being killed leaves nothing that looks like one."""
    doomed = aside(path.parent, path.name)
    path.rename(doomed)
    _delete(doomed)


def write_through(file: Path, content: bytes) -> None:
    """Write ``file`` and wait until it is on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _places(folder: Path) -> list[Checkpoint | tuple[Path, str]]:
    """What is called like a checkpoint, newest first: one, or its folder and why it is none."""
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    found: list[Checkpoint | tuple[Path, str]] = []
    for step, path in sorted(steps, reverse=True):
        try:
            found.append(Checkpoint(path, step, _manifest(path / MANIFEST, step)))
        except (OSError, ValueError) as error:
            found.append((path, f"{MANIFEST} {'is missing' if isinstance(error, OSError) else error}"))
    return found


def _manifest(file: Path, step: int) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError("is no JSON") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise ValueError(f"is not of version {VERSION}")
    if manifest.pop("digest", None) != _digest(manifest) or manifest.get("step") != step:
        raise ValueError("is not what was written (another SHA-256)")
    files, world = manifest.get("files"), manifest.get("world")
    if not _lists(files) or type(world) is not int or not 1 <= world <= len(files) or "facts" not in manifest:
        raise ValueError("does not say which files there are, and of how many processes")
    needed = {METADATA, PLAIN, *(MINE.format(rank) for rank in range(world))}
    if missing := needed - set(files):
        raise ValueError(f"lists no {min(missing)}")
    if foreign := [name for name in files if not _FILE.fullmatch(name)]:
        raise ValueError(f"lists {foreign[0]!r}, which is no file of a checkpoint")
    return manifest


def _lists(files: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(files, dict) and all(
        isinstance(file, dict) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
        for file in files.values()
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _latest(folder: Path) -> str | None:
    file = folder / LATEST
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _delete(path: Path) -> None:
    """What cannot be removed stops nothing: it no longer looks like a checkpoint, and the next sweep tries again."""
    remove: Callable[[Path], Any] = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
    try:
        remove(path)
    except FileNotFoundError:
        return  # somebody else did
    except OSError as error:
        warnings.warn(f"{path} could not be removed ({error}); the next save tries again.", stacklevel=2)
