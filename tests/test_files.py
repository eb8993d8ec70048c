"""Folders that one process alone writes into: what holds, what looks, and what is handed down."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepstack_pl import files
from deepstack_pl.cli.launch import _before_it_begins
from deepstack_pl.files import handed_down, hold, is_held, let_go


def once_locked(do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``do`` happen between the first lock and whatever follows on it."""
    real, locked = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        real(handle, how)
        locked.append(handle)
        if len(locked) == 1:
            do()

    monkeypatch.setattr(files.fcntl, "flock", flock)


def test_a_folder_that_was_made_anew_is_held_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two hold what goes by one name: the first the folder that was removed, the second the one there is."""
    folder = tmp_path / "run"
    folder.mkdir()

    def anew() -> None:
        folder.rename(tmp_path / "removed")
        folder.mkdir()

    once_locked(anew, monkeypatch)
    handle = hold(folder)
    assert os.path.samestat(os.fstat(handle), folder.stat())
    assert not is_held(tmp_path / "removed")
    let_go(handle)


def test_a_folder_that_was_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    once_locked(folder.rmdir, monkeypatch)
    before = set(files._held)
    with pytest.raises(FileNotFoundError):
        hold(folder)
    assert files._held == before


def test_who_looks_does_not_see_another_who_looks(tmp_path: Path) -> None:
    other = files._locked(tmp_path, fcntl.LOCK_SH)
    assert not is_held(tmp_path)
    os.close(other)
    handle = hold(tmp_path)
    assert is_held(tmp_path)
    let_go(handle)
    assert not is_held(tmp_path)


def test_what_was_handed_down_is_held_until_both_let_go(tmp_path: Path) -> None:
    """So that the processes of a launcher that is killed keep others out for as long as one of them lives."""
    handle = hold(tmp_path)
    script = (
        "import os, sys; from deepstack_pl.files import hold_with\n"
        "handle = int(sys.argv[1]); hold_with(handle)\n"
        "assert not os.get_inheritable(handle)\n"
        "child = os.fork()\n"
        "child or (sys.stdin.close(), os.close(1), __import__('time').sleep(60))\n"
        "print(child, flush=True); sys.stdin.read()"
    )
    with handed_down(handle) as handed:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, handed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=handed,
            preexec_fn=_before_it_begins,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        let_go(handle)
        assert is_held(tmp_path)
        process.stdin.close()
        assert process.wait(60) == 0
        assert not is_held(tmp_path), "its own fork, as a data worker, does not hold"
    finally:
        os.kill(child, 9)
        process.stdout.close()
