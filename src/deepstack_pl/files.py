"""Files that are whole or not there, and folders that one process alone writes into."""

import fcntl
import os
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
    """Keep other processes from holding ``folder`` until `let_go`, or until this process ends, however it does: nothing
    is left behind.

    Raises:
        BlockingIOError: another one holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    return handle


def let_go(handle: int) -> None:
    """Let others hold what `hold` gave ``handle`` for."""
    _held.discard(handle)
    os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process, this one too, holds ``folder``."""
    try:
        let_go(hold(folder))
    except BlockingIOError:
        return True
    except OSError:
        return False  # it is not there, or its file system has no locks
    return False


def _forget() -> None:
    """A data worker that outlives a killed run for a moment would keep others out."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
