"""Building is whole or marked, goes on where it was stopped, and never mixes two sets."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builds import SMALL, built, large, rows_of, tars
from replicas import Replica, jpeg, picture, write_replica

from deepstack_pl.data import build as building
from deepstack_pl.data import shard_writers
from deepstack_pl.data.build import How
from deepstack_pl.data.config import OnMissing
from deepstack_pl.data.index import sidecar
from deepstack_pl.data.shard_jobs import Job, write_shard
from deepstack_pl.data.sources import ShardSource
from deepstack_pl.data.verify import shard_folders, verify


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Replica:
    return write_replica("llava665k", tmp_path_factory.mktemp("mix"))


@pytest.mark.slow
def test_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    replica = large(tmp_path, clean=False)
    one = built(replica, tmp_path / "one", SMALL)
    two = built(replica, tmp_path / "two", How(missing=OnMissing.skip, max_bytes=100_000, processes=2))
    assert len(tars(one.out)) > 4
    assert tars(one.out) == tars(two.out)
    assert (one.out / "manifest.json").read_bytes() == (two.out / "manifest.json").read_bytes()
    assert (one.out / "left_out.jsonl").read_bytes() == (two.out / "left_out.jsonl").read_bytes()
    assert all(size <= 110_000 for size in (len(data) for data in tars(one.out).values()))


def test_building_again_keeps_what_is_finished_and_makes_what_is_not(tmp_path: Path) -> None:
    replica = large(tmp_path)
    first = built(replica, tmp_path / "out", SMALL)
    before, count = tars(first.out), len(tars(first.out))
    assert built(replica, first.out, SMALL).kept == count
    shard = first.out / "train/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    sidecar(first.out / "train/shard-000000.tar").unlink()
    (first.out / "train/shard-000002.tar").unlink()
    again = built(replica, first.out, SMALL)
    assert again.kept == count - 3
    assert tars(first.out) == before
    assert not verify(shard_folders(first.out)).damage


def test_an_image_of_another_date_is_read_again(tmp_path: Path) -> None:
    replica = large(tmp_path)
    first = built(replica, tmp_path / "out", SMALL)
    image = replica.images / replica.records[0]["image"]
    image.write_bytes(jpeg(picture(99, 500, 400)) + bytes(9000))
    again = built(replica, first.out, SMALL)
    assert 0 < again.kept < len(tars(first.out))


def test_an_image_that_comes_later_is_taken_in_and_the_same_records_are_held_out(tmp_path: Path) -> None:
    replica = large(tmp_path)
    image = replica.images / replica.records[8]["image"]
    data = image.read_bytes()
    image.unlink()
    without = built(replica, tmp_path / "out", SMALL)
    assert {line.reason for line in without.left_out} == {"missing"}
    held = set(rows_of(ShardSource(without.out / "val")))
    image.write_bytes(data)
    built(replica, without.out, SMALL)
    assert held - {8} == set(rows_of(ShardSource(without.out / "val"))) - {8}
    assert not (without.out / "left_out.jsonl").read_text()
    assert not verify(shard_folders(without.out)).damage
    assert tars(without.out) == tars(built(replica, tmp_path / "fresh", SMALL).out)


def test_stopping_leaves_no_half_shard_and_keeps_the_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = large(tmp_path)
    built(replica, tmp_path / "out", SMALL)
    for tar in (tmp_path / "out").rglob("*.tar"):
        tar.unlink()
    calls = []

    def stop_at_third(job: Job, advance: Callable[[int], object]) -> object:
        calls.append(job)

        def moved(done: int) -> None:
            if len(calls) == 3:
                raise KeyboardInterrupt
            advance(done)

        return write_shard(job, moved)

    monkeypatch.setattr(shard_writers, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        built(replica, tmp_path / "out", SMALL)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob(".shard*"))
    assert len(tars(tmp_path / "out")) == 2
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(ValueError, match="samples are missing"):
        ShardSource(tmp_path / "out/train")
    assert built(replica, tmp_path / "out", SMALL).kept == 2


def test_stopping_several_processes_ends_them_at_their_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = large(tmp_path)
    heavy = jpeg(picture(1, 1500, 1000))
    for record in replica.records[:30]:
        if isinstance(record.get("image"), str):
            (replica.images / record["image"]).write_bytes(heavy)
    replica.json.write_text(json.dumps(replica.records[:30] * 12))

    @contextmanager
    def stopping_bar(*_: object, **__: object) -> Iterator[Callable[[int], None]]:
        def advance(done: int) -> None:
            if done:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(shard_writers, "bar", stopping_bar)
    with pytest.raises(KeyboardInterrupt):
        built(replica, tmp_path / "out", How(processes=2))
    assert not list((tmp_path / "out").rglob(".shard*"))
    assert not (tmp_path / "out/train/shard-000000.tar").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_samples": 3}, r"was built otherwise: val_samples 256 \(now 3\)"),
        ({"max_bytes": 200_000}, r"max_bytes 384000000 \(now 200000\)"),
        ({"decode": False}, r"decode True \(now False\)"),
    ],
)
def test_sets_are_never_mixed(mix: Replica, tmp_path: Path, change: dict, message: str) -> None:
    built(mix, tmp_path / "out")
    before = tars(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        built(mix, tmp_path / "out", How(**{"missing": OnMissing.skip, **change}))
    assert tars(tmp_path / "out") == before


def test_another_json_file_is_refused_by_digest(tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    built(replica, tmp_path / "out")
    replica.json.write_text(replica.json.read_text().replace("Picture 3", "Painting 3"))
    with pytest.raises(ValueError, match=r"json_sha256 [0-9a-f]{64} \(now [0-9a-f]{64}\).*never mixed"):
        built(replica, tmp_path / "out")


def test_a_set_built_with_skip_survives_a_call_without(mix: Replica, tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    (replica.images / replica.records[2]["image"]).write_bytes(b"no picture")
    built(replica, tmp_path / "out")
    report = built(replica, tmp_path / "out", How())
    assert not report.whole
    assert [line.row for line in report.left_out] == [
        row for row, record in enumerate(replica.records) if record["image"] == replica.records[2]["image"]
    ]
    assert (tmp_path / "out/manifest.json").exists()
    assert len(ShardSource(tmp_path / "out/train"))


def test_shards_of_another_making_are_not_touched(mix: Replica, tmp_path: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/mine.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"mine\.tar was not made by this command\. Choose another out="):
        built(mix, tmp_path / "out")
    assert (tmp_path / "out/train/mine.tar").read_bytes() == b"mine"


def test_two_builds_into_one_folder_do_not_meet(mix: Replica, tmp_path: Path) -> None:
    built(mix, tmp_path / "out")
    with (tmp_path / "out/.build/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build writes here"):
            built(mix, tmp_path / "out")


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    mix: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"\d[\d,]+ bytes are to be written, but 0 are free\. Make room"):
        built(mix, tmp_path / "out")
    assert not tars(tmp_path / "out")


def test_a_json_file_that_changes_meanwhile_gives_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)

    def change(*jobs: object) -> Iterator[object]:
        replica.json.write_text(replica.json.read_text() + " ")
        return iter(())

    monkeypatch.setattr(building, "write_all", change)
    with pytest.raises(ValueError, match=r"json changed while it was read\. Remove .*out, and build again"):
        built(replica, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_shards_that_are_no_longer_needed_go(tmp_path: Path) -> None:
    replica = large(tmp_path)
    first = built(replica, tmp_path / "out", SMALL)
    before = len(tars(first.out))
    for record in replica.records[5:30]:
        if isinstance(record.get("image"), str):
            (replica.images / record["image"]).unlink()
    fewer = tars(built(replica, first.out, SMALL).out)
    assert len(fewer) < before
    assert fewer == tars(built(replica, tmp_path / "fresh", SMALL).out)
    assert not verify(shard_folders(first.out)).damage
    assert len(list((first.out / ".build").glob("*-*.json"))) == len(fewer)


@pytest.mark.parametrize("name", ["manifest.json", "left_out.jsonl", "train/manifest.json"])
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    theirs = tmp_path / "project" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with pytest.raises(ValueError, match="was not made by this command"):
        built(replica, tmp_path / "project")
    assert theirs.read_text() == "precious"


def test_building_again_with_nothing_to_do_touches_nothing(tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path)
    built(replica, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "lock"}
    report = built(replica, tmp_path / "out")
    assert (report.whole, report.kept) == (True, 2)
    assert report.left_out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_images_of_the_same_names_sizes_and_dates_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path / "a", clean=True)
    built(replica, tmp_path / "out")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = replica._replace(root=tmp_path / "b", images=tmp_path / "b" / replica.images.relative_to(tmp_path / "a"))
    assert built(other, tmp_path / "out").kept == 0
