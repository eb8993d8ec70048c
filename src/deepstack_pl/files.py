"""Files that are whole or not there, and folders that one process alone writes into."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write ``file`` in one stroke: a reader finds the old text or the new, never half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


_held: set[int] = set()


def hold(folder: Path) -> int:
    """Keep other processes of this machine from holding ``folder`` until `let_go`, or until this process ends, however
    it does: nothing is left behind. Linux keeps the lock of a folder on NFS to the one machine that took it.

    Raises:
        BlockingIOError: another one holds it.
        FileNotFoundError: it is not there, or was removed by who held it.
        OSError: its file system has no locks.
    """
    handle = _locked(folder, fcntl.LOCK_EX)
    _held.add(handle)
    return handle


def hold_or_warn(folder: Path, name: str) -> int | None:
    """`hold`; where its file system has no locks None, and a line on the terminal that calls the folder ``name``."""
    try:
        return hold(folder)
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError as error:
        print(f"{name} cannot be locked ({error.strerror}): start nothing there twice.", file=sys.stderr)
        return None


@contextmanager
def handed_down(handle: int | None) -> Iterator[tuple[int, ...]]:
    """What processes that are started meanwhile are to be given (``pass_fds``) for `hold_with`: a copy, because what
    this one holds is closed wherever it forks.
    """
    if handle is None:
        yield ()
        return
    copy = os.dup(handle)
    try:
        yield (copy,)
    finally:
        os.close(copy)


def hold_with(handle: int) -> None:
    """Hold what the process that started this one holds and has `handed_down`: others are kept out until both have let
    go.
    """
    os.set_inheritable(handle, False)
    _held.add(handle)


def let_go(handle: int) -> None:
    """Let others hold what `hold` gave ``handle`` for."""
    _held.discard(handle)
    os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process of this machine, this one too, holds ``folder``. Who looks is in no other's way who looks, and
    only for a moment in the way of who holds.
    """
    try:
        os.close(_locked(folder, fcntl.LOCK_SH))
    except BlockingIOError:
        return True
    except OSError:
        return False  # it is not there, or its file system has no locks
    return False


def _locked(folder: Path, how: int) -> int:
    """An open ``folder`` that is locked, and is still what goes by its name: who held it may have removed it."""
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _forget() -> None:
    """A data worker that outlives a killed run for a moment would keep others out."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
