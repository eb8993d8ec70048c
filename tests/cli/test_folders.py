"""A run's folder: who has it, who is refused, and when an empty one goes."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from deepstack_pl import files
from deepstack_pl.cli import folders
from deepstack_pl.cli.folders import Live, alone, discard_if_empty
from deepstack_pl.files import hold, is_held, let_go


def test_a_start_that_meets_a_look_waits_for_its_end(tmp_path: Path) -> None:
    looking = files._locked(tmp_path, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, (looking,)).start()
    with alone(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


@pytest.mark.parametrize("free", [True, False])
def test_a_second_start_is_told_of_another_folder_only_where_it_may_name_one(free: bool, tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(Live, match="Wait for its end, or stop it") as refused,
        alone(tmp_path, free=free),
    ):
        pass
    assert ("hydra.run.dir" in str(refused.value)) is free


def test_a_refused_start_leaves_the_empty_folder_of_a_run_that_has_written_nothing_yet(tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    with alone(folder):
        discard_if_empty(folder)
        assert folder.is_dir()
        with pytest.raises(Live), alone(folder):
            pass
    discard_if_empty(folder)
    assert not folder.parent.exists()


def test_a_start_that_found_a_folder_which_then_was_removed_makes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder, removed = fcntl.flock, tmp_path / "day" / "run", []

    def flock(handle: int, how: int) -> None:
        if not removed:
            removed.append(folder)
            discard_if_empty(folder)
        real(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with alone(folder):
        assert removed
        assert is_held(folder)


def test_what_has_begun_between_a_look_and_the_removal_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def held_at_last(path: Path) -> int:
        (folder / "config.yaml").touch()
        return hold(path)

    monkeypatch.setattr(folders, "hold", held_at_last)
    discard_if_empty(folder)
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_warned_of_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", none)
    with alone(tmp_path / "run") as handle:
        assert handle is None
    assert f"run cannot be locked ({os.strerror(number)}): start nothing there twice" in capsys.readouterr().err
    assert not is_held(tmp_path / "run")
    discard_if_empty(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lock_of_another_is_no_file_system_without_locks(tmp_path: Path) -> None:
    other = hold(tmp_path)
    with pytest.raises(BlockingIOError):
        files.hold_or_warn(tmp_path, "run")
    let_go(other)
