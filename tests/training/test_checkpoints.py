"""Checkpoints as files: which are found, which are whole, which go. No tensors, no torch."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from deepstack_pl.training import checkpoints
from deepstack_pl.training.checkpoints import all_of, aside, name_of, newest, prune, remember, seal, sweep, verify

FILES = {".metadata": b"places", "run.pt": b"plain", "process-0.pt": b"mine", "process-1.pt": b"mine"}
TENSORS = {f"__{rank}_0.distcp": bytes([rank]) * 50 for rank in range(4)}


def make(folder: Path, step: int, **changed: object) -> Path:
    """A checkpoint as `Store` leaves it, but for what its files say."""
    place = folder / name_of(step)
    place.mkdir(parents=True)
    files = {}
    for name, content in (FILES | TENSORS).items():
        (place / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"version": 1, "step": step, "world": 2, "facts": {"a": 1}, "files": files} | changed
    (place / "manifest.json").write_bytes(seal(manifest))
    return place


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in all_of(folder)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_is_that_of_the_latest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    os.utime(tmp_path / name_of(100), (0, 0))
    remember(tmp_path, name_of(9))
    assert steps(tmp_path) == [100, 20, 9]
    found, passed = newest(tmp_path)
    assert found is not None
    assert (found.step, passed) == (100, [])


def test_where_there_is_none_none_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda place: (place / "manifest.json").write_text("{"), "manifest.json is no JSON"),
        (lambda place: (place / "manifest.json").write_text("[]"), "manifest.json is not of version 1"),
        (lambda place: edit(place, b'"world": 2', b'"world": 1'), "manifest.json is not what was written"),
        (lambda place: place.rename(place.with_name(name_of(40))), "manifest.json is not what was written"),
        (lambda place: (place / "run.pt").unlink(), "run.pt is missing"),
        (lambda place: (place / "run.pt").write_bytes(b"plai."), "run.pt is not what was written"),
        (lambda place: (place / "__1_0.distcp").write_bytes(b"x"), "__1_0.distcp has 1 bytes, not 50"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_sentence(tmp_path: Path, damage: object, said: str) -> None:
    make(tmp_path, 10)
    assert callable(damage)
    damage(make(tmp_path, 30))
    found, passed = newest(tmp_path)
    assert found is not None
    assert found.step == 10
    (sentence,) = passed
    assert said in sentence
    assert "passed over" in sentence


def edit(place: Path, old: bytes, new: bytes) -> None:
    file = place / "manifest.json"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def test_a_manifest_cannot_name_what_lies_elsewhere_nor_leave_out_what_is_needed(tmp_path: Path) -> None:
    make(tmp_path, 1, files={name: {"bytes": 1, "sha256": ""} for name in [*FILES, "../else"]})
    make(tmp_path, 2, world=3)
    make(tmp_path, 3, version=2)
    found, passed = newest(tmp_path)
    assert found is None
    assert ["not of version 1" in passed[0], "lists no process-2.pt" in passed[1], "../else" in passed[2]] == [True] * 3


@pytest.mark.parametrize("change", [{"world": None}, {"world": 10**12}, {"files": []}, {"files": {"run.pt": None}}])
def test_a_sealed_manifest_without_what_is_needed_is_passed_over(change: dict, tmp_path: Path) -> None:
    make(tmp_path, 1, **change)
    found, (sentence,) = newest(tmp_path)
    assert found is None
    assert "does not say which files there are, and of how many processes" in sentence


def test_a_flipped_byte_of_tensors_is_found_by_a_deep_look_alone(tmp_path: Path) -> None:
    place = make(tmp_path, 5)
    (place / "__2_0.distcp").write_bytes(bytes([2]) * 49 + b"\0")
    (checkpoint,) = all_of(tmp_path)
    assert verify(checkpoint, deep=False) == []
    assert verify(checkpoint) == ["__2_0.distcp is not what was written (another SHA-256)"]
    assert newest(tmp_path, deep=True)[0] is None


def test_processes_divide_the_digests_and_miss_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 5)
    (checkpoint,) = all_of(tmp_path)
    looked: list[str] = []
    real = checkpoints.sha256
    monkeypatch.setattr(checkpoints, "sha256", lambda file: (looked.append(file.name), real(file))[1])
    shares = []
    for rank in range(3):
        looked.clear()
        assert verify(checkpoint, share=(rank, 3)) == []
        shares.append([name for name in looked if name in TENSORS])
        assert set(looked) >= set(FILES)
    assert sorted(chain.from_iterable(shares)) == sorted(TENSORS)


def test_what_dead_processes_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    make(tmp_path, 1)
    remember(tmp_path, name_of(1))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = aside(tmp_path, name_of(2))
    living = here.with_name(here.name.replace(f"-{os.getpid()}-", f"-{child.pid}-"))
    for path in (here, living, tmp_path / f"{name_of(3)}.tmp-other-host-1-abcd"):
        path.mkdir()
        (path / "file").touch()
    aside(tmp_path, "latest").touch()
    try:
        sweep(tmp_path)
        assert names(tmp_path) == {name_of(1), "latest", living.name}
    finally:
        child.communicate()
    sweep(tmp_path)
    assert names(tmp_path) == {name_of(1), "latest"}


def test_the_newest_stay_and_latest_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    remember(tmp_path, name_of(4))
    prune(tmp_path, 2)
    assert steps(tmp_path) == [4, 3]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_steps_after_latest_are_of_a_way_that_was_left_and_count_for_nothing(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    remember(tmp_path, name_of(20))
    prune(tmp_path, 2)
    assert steps(tmp_path) == [20, 10]


def test_fewer_than_two_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep=1: .* Keep 2 or more"):
        prune(tmp_path, 1)


def test_a_removal_cut_short_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    def killed(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise Killed

    for step in (1, 2, 3):
        make(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            prune(tmp_path, 2)
    found, passed = newest(tmp_path, deep=True)
    assert found is not None
    assert (found.step, passed, steps(tmp_path)) == (3, [], [3, 2])
    sweep(tmp_path)
    assert names(tmp_path) == {name_of(2), name_of(3)}


def test_what_cannot_be_removed_is_warned_of_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path) -> None:
        raise OSError("busy")

    for step in (1, 2, 3):
        make(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", busy)
        with pytest.warns(UserWarning, match=r"could not be removed \(busy\); the next save tries again"):
            prune(tmp_path, 2)
    assert steps(tmp_path) == [3, 2]
    sweep(tmp_path)
    assert names(tmp_path) == {name_of(2), name_of(3)}


def test_a_manifest_keeps_facts_with_keys_that_json_turns_into_words(tmp_path: Path) -> None:
    make(tmp_path, 1, facts={1: (2, 3)})
    (checkpoint,) = all_of(tmp_path)
    assert checkpoint.manifest["facts"] == {"1": [2, 3]}
    assert "digest" not in checkpoint.manifest
    assert json.loads((checkpoint.folder / "manifest.json").read_text())["digest"]


def test_it_loads_without_torch() -> None:
    check = "import sys, deepstack_pl.training.checkpoints; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
