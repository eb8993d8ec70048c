"""A finished set is replaced at once or not at all, and what stops a build is named."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builds import SMALL, built, large, tars
from replicas import jpeg, picture, write_replica

from deepstack_pl.data import shard_jobs, shard_writers
from deepstack_pl.data.build import How
from deepstack_pl.data.index import ShardIndex, sidecar
from deepstack_pl.data.shard_jobs import Job, write_shard
from deepstack_pl.data.verify import shard_folders, verify


def contents(out: Path) -> dict[Path, bytes]:
    shown = [path for path in out.rglob("*") if path.is_file() and ".build" not in path.parts]
    return {path: path.read_bytes() for path in shown}


def test_a_finished_set_stays_as_it_is_until_what_replaces_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, strict = large(tmp_path), How(max_bytes=100_000)
    out = built(replica, tmp_path / "out", strict).out
    before = contents(out)
    files = [replica.images / replica.records[row]["image"] for row in (0, 24)]
    data = [file.read_bytes() for file in files]
    files[0].write_bytes(jpeg(picture(99, 500, 400)))
    files[1].write_bytes(data[1][:1500])
    report = built(replica, out, strict)
    assert (report.whole, [line.reason for line in report.left_out][:1]) == (False, ["image"])
    assert contents(out) == before
    assert not verify(shard_folders(out), out).damage
    files[1].write_bytes(data[1])  # of another date: its shard is written again
    monkeypatch.setattr(shard_jobs, "decode_image", lambda *_: pytest.fail("an interruption"))
    with pytest.raises(pytest.fail.Exception):
        built(replica, out, strict)
    assert contents(out) == before
    monkeypatch.undo()
    assert built(replica, out, strict).whole
    assert tars(out) == tars(built(replica, tmp_path / "fresh", strict).out)
    assert not (out / ".build/aside").exists()
    assert not verify(shard_folders(out), out).damage


def test_what_was_written_aside_before_a_stop_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = large(tmp_path)
    out = built(replica, tmp_path / "out", SMALL).out
    for row in (0, 28):
        (replica.images / replica.records[row]["image"]).write_bytes(jpeg(picture(row + 50, 500, 400)))
    tried: list[Path] = []

    def stop_after_first(job: Job, advance: Callable[[int], object]) -> object:
        tried.append(job.path)
        if len(tried) > 1:
            raise KeyboardInterrupt
        return write_shard(job, advance)

    monkeypatch.setattr(shard_writers, "write_shard", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        built(replica, out, SMALL)
    with pytest.raises(KeyboardInterrupt):
        built(replica, out, SMALL)
    first, second, again = tried
    assert first != second == again
    monkeypatch.undo()
    built(replica, out, SMALL)
    assert tars(out) == tars(built(replica, tmp_path / "fresh", SMALL).out)


def test_a_system_error_names_the_folder_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there/shard-000000.tar")

    monkeypatch.setattr(shard_jobs.ShardFile, "write", full)
    message = r"out: the build stopped at there/shard-000000\.tar \(No space left on device\)\. Make room.* are kept"
    with pytest.raises(ValueError, match=message):
        built(replica, tmp_path / "out")


def test_a_shard_whose_digest_is_not_the_one_written_is_written_again(tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    out = built(replica, tmp_path / "out").out
    index = sidecar(out / "train/shard-000000.tar")
    replace(ShardIndex.load(index), sha256="0" * 64).save(index)
    assert built(replica, out).kept == 1
    assert not verify(shard_folders(out), out).damage
