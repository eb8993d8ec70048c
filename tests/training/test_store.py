"""A checkpoint is whole or not there: killed, torn, full, forged, late or not finite."""

import multiprocessing
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepstack_pl.training import checkpoints, store
from deepstack_pl.training.checkpoints import all_of, newest, seal, verify
from deepstack_pl.training.restore import read_mine, read_model, read_plain, read_tensors
from deepstack_pl.training.store import SaveFailed, Saver, Store, flat

FACTS = {"config": "a digest"}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(value: float) -> dict[str, Any]:
    """Weights and AdamW's states by dotted names, some of other dtypes and shapes."""
    value = float(value)
    weights = {"llm.0.weight": torch.full((3, 2), value), "gate": torch.full((), value, dtype=torch.bfloat16)}
    moments = {"llm.0.weight": {"step": torch.tensor(value), "exp_avg": torch.full((3, 2), value)}}
    return {"model": {**weights, "positions": torch.arange(4)}, "optimizer": moments}


def write(folder: Path, step: int, value: float | None = None) -> None:
    Store(folder).write(step, state(step if value is None else value), {"global_step": step}, {"rank": 0}, FACTS)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in all_of(folder)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    left, right = dict(flat(one)), dict(flat(other))
    same = [left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left]
    return left.keys() == right.keys() and all(same)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 7)
    (checkpoint,) = all_of(tmp_path)
    found = state(0)
    read_tensors(checkpoint, found)
    assert equal(found, state(7))
    assert equal({"model": read_model(checkpoint)}, {"model": state(7)["model"]})
    assert read_plain(checkpoint) == {"global_step": 7}
    assert read_mine(checkpoint, 0) == {"rank": 0}
    assert read_mine(checkpoint, 1) is None
    assert checkpoint.manifest["facts"] == FACTS
    assert verify(checkpoint) == []
    listed = {"manifest.json", *checkpoint.manifest["files"]}
    assert (
        names(checkpoint.folder) == listed == {"manifest.json", ".metadata", "__0_0.distcp", "run.pt", "process-0.pt"}
    )


def test_the_newest_two_stay_and_latest_names_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert names(tmp_path) == {"step-00000002", "step-00000003", "latest"}
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def killed(folder: Path, prepare: Callable[[], None]) -> None:
    """Write step 30 in a process of its own, which ``prepare`` has kill itself on the way."""

    def child() -> None:
        torch.set_num_threads(1)
        prepare()
        write(folder, 30)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == -signal.SIGKILL


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_writing_tensors() -> None:
    class Torn(store.FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            file = next(Path(self.path).glob("*.distcp"))
            file.write_bytes(file.read_bytes()[:100])
            die()

    store.FileSystemWriter = Torn  # type: ignore[misc]


def before_the_manifest() -> None:
    checkpoints.seal = die  # type: ignore[assignment]


def within_the_manifest() -> None:
    real = store.write_through

    def torn(file: Path, content: bytes) -> None:
        if file.name != "manifest.json":
            return real(file, content)
        file.write_bytes(content[:50])
        return die()

    store.write_through = torn


def before_the_commit() -> None:
    store.os.replace = die  # type: ignore[assignment]


def after_the_commit() -> None:
    checkpoints.remember = die


def within_latest() -> None:
    Path.replace = die  # type: ignore[method-assign, assignment]


def while_pruning() -> None:
    checkpoints.shutil.rmtree = die  # type: ignore[assignment]


BEFORE = [while_writing_tensors, before_the_manifest, within_the_manifest, before_the_commit]
AFTER = [after_the_commit, within_latest, while_pruning]


@pytest.mark.parametrize("where", BEFORE + AFTER, ids=lambda where: where.__name__)
def test_a_kill_at_any_point_leaves_whole_checkpoints_alone(tmp_path: Path, where: Callable[[], None]) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    killed(tmp_path, where)
    found, passed = newest(tmp_path, deep=True)
    assert found is not None
    assert (found.step, passed) == (20 if where in BEFORE else 30, [])
    assert len(all_of(tmp_path)) >= 2
    assert any(".tmp-" in name for name in names(tmp_path)) or where is after_the_commit
    again = state(0)
    read_tensors(found, again)
    assert equal(again, state(found.step))
    write(tmp_path, 40)
    assert names(tmp_path) == {f"step-{found.step:08}", "step-00000040", "latest"}


def damaged(folder: Path) -> Path:
    """The newer of two checkpoints, to be damaged."""
    write(folder, 1)
    write(folder, 2)
    return folder / "step-00000002"


def test_a_flipped_bit_of_a_tensor_is_found_and_the_one_before_is_taken(tmp_path: Path) -> None:
    file = damaged(tmp_path) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    place = content.index(torch.full((3, 2), 2.0).numpy().tobytes())
    content[place + 2] ^= 1
    file.write_bytes(content)
    spoilt = state(0)
    read_tensors(all_of(tmp_path)[0], spoilt)  # torch itself does not notice
    assert not equal(spoilt, state(2))
    found, passed = newest(tmp_path, deep=True)
    assert found is not None
    assert found.step == 1
    assert "__0_0.distcp is not what was written" in passed[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.pt", "process-0.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_torn_and_missing_files_are_named_and_the_one_before_is_taken(tmp_path: Path, name: str, how: str) -> None:
    file = damaged(tmp_path) / name
    content = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    found, passed = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert name in passed[0]


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_metadata_that_is_not_the_manifests_is_not_unpickled(tmp_path: Path) -> None:
    place = damaged(tmp_path)
    (place / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata is not what was written"):
        read_tensors(all_of(tmp_path)[0], state(0))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "said"), [(".metadata", "names pathlib.Path.touch"), ("run.pt", "Weights only")])
def test_pickles_run_nothing_even_where_the_manifest_was_forged_too(tmp_path: Path, name: str, said: str) -> None:
    checkpoint = all_of(tmp_path)[0] if damaged(tmp_path) else None
    assert checkpoint is not None
    file = checkpoint.folder / name
    bomb = Bomb(tmp_path / "ran")
    if name == "run.pt":
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    forged = {"bytes": file.stat().st_size, "sha256": checkpoints.sha256(file)}
    manifest = checkpoint.manifest | {"files": checkpoint.manifest["files"] | {name: forged}}
    (checkpoint.folder / "manifest.json").write_bytes(seal(manifest))
    (forged_one, _) = all_of(tmp_path)
    assert verify(forged_one) == []
    with pytest.raises((ValueError, pickle.UnpicklingError), match=said):
        read_plain(forged_one) if name == "run.pt" else read_tensors(forged_one, state(0))
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_fails_the_save_and_spoils_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(SaveFailed, match=r"step 2 was not written\. .*File too large.* Earlier ones are"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == {"step-00000001", "latest"}
    assert newest(tmp_path, deep=True)[1] == []
    write(tmp_path, 2)
    assert steps(tmp_path) == [2, 1]


def test_a_disk_with_too_little_room_is_not_begun_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for _, tensor in flat(state(0)))
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: Room(int(1.19 * size)))
    with pytest.raises(SaveFailed, match=r"0\.00 GB free, .*asks for a fifth more than that\. Make room"):
        write(tmp_path, 1)
    assert names(tmp_path) == set()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: Room(int(1.21 * size)))
    write(tmp_path, 1)


class Room:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.gate", "optimizer.llm.0.weight.exp_avg"])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path: Path, value: float, name: str) -> None:
    tensors = state(1)
    dict(flat(tensors))[name].view(-1)[-1] = value
    with pytest.raises(SaveFailed, match=f"{name} holds a number that is not finite"):
        Store(tmp_path).write(1, tensors, {}, {}, FACTS)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_again_without_pickles_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="Weights only load failed"):
        Store(tmp_path).write(1, state(1), {"path": Bomb(tmp_path)}, {}, FACTS)
    with pytest.raises(SaveFailed, match=r"model\.x is a str: it would be pickled"):
        Store(tmp_path).write(1, {"model": {"x": "a word"}}, {}, {}, FACTS)
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_saved_stays_and_a_damaged_or_another_runs_is_replaced(tmp_path: Path) -> None:
    def value() -> float:
        found = state(0)
        read_tensors(all_of(tmp_path)[0], found)
        return found["model"]["gate"].item()

    write(tmp_path, 1)
    write(tmp_path, 1, value=2.0)
    assert value() == 1
    Store(tmp_path).write(1, state(3), {}, {}, {"config": "another"})
    assert value() == 3
    (tmp_path / "step-00000001" / "run.pt").write_bytes(b"")
    Store(tmp_path).write(1, state(4), {}, {}, {"config": "another"})
    assert value() == 4
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    write(tmp_path, 1, value=5.0)
    assert value() == 5
    assert names(tmp_path) == {"step-00000001", "latest"}


def test_a_disk_that_fails_after_the_commit_is_warned_of_and_the_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, name: str) -> None:
        raise OSError("full")

    monkeypatch.setattr(checkpoints, "remember", full)
    with pytest.warns(UserWarning, match="step-00000001 is saved, but what came after failed: full"):
        write(tmp_path, 1)
    assert newest(tmp_path, deep=True)[1] == []


def test_another_models_names_shapes_and_dtypes_are_listed_and_nothing_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = state(0)
    other["model"]["llm.0.weight"] = torch.zeros(5, 2)
    other["model"]["gate"] = torch.zeros(())
    other["model"]["more"] = torch.zeros(1)
    del other["optimizer"]["llm.0.weight"]["step"]
    with pytest.raises(ValueError, match="another model or optimiser") as refusal:
        read_tensors(all_of(tmp_path)[0], other)
    for said in (
        "model.llm.0.weight was float32[3, 2] and is float32[5, 2]",
        "model.gate was bfloat16[] and is float32[]",
        "model.more was not saved",
        "optimizer.llm.0.weight.step was saved and is not here",
    ):
        assert said in str(refusal.value)
    assert not any(tensor.any() for name, tensor in flat(other) if name != "model.positions")


def test_fewer_than_two_are_refused_before_anything_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=1"):
        Store(tmp_path, keep=1)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a save waits for before it writes tensors."""
    event, real = threading.Event(), store.dcp.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert event.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(store.dcp, "save", slow)
    yield event
    event.set()


def test_a_save_under_way_holds_what_was_true_when_it_began(tmp_path: Path, gate: threading.Event) -> None:
    tensors, plain, mine = state(1), {"steps": [1]}, {"random": torch.ones(2)}
    tied: Tensor = tensors["model"]["llm.0.weight"]
    tensors["model"]["head"] = tied
    tensors["model"]["part"] = tied[1:]
    saver = Saver(Store(tmp_path))
    saver.start(1, tensors, plain, mine, FACTS)
    for _, tensor in flat(tensors):
        tensor.fill_(9)
    plain["steps"].append(9)
    mine["random"].fill_(9)
    gate.set()
    saver.close()
    (checkpoint,) = all_of(tmp_path)
    weights = read_model(checkpoint)
    for name in ("llm.0.weight", "head", "part"):
        assert weights[name].eq(1).all()
    assert read_plain(checkpoint) == {"steps": [1]}
    assert torch.equal((read_mine(checkpoint, 0) or {})["random"], torch.ones(2))


def test_training_goes_on_while_one_is_written_and_the_next_waits_for_it(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(Store(tmp_path))
    saver.start(1, state(1), {}, {}, FACTS)
    assert steps(tmp_path) == []
    assert not (tmp_path / "latest").exists()
    second = threading.Thread(target=saver.start, args=(2, state(2), {}, {}, FACTS))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(30)
    saver.close()
    assert steps(tmp_path) == [2, 1]


def test_a_save_that_failed_is_heard_of_at_the_next_and_latest_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("no disk")

    saver = Saver(Store(tmp_path))
    saver.start(1, state(1), {}, {}, FACTS)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(store.dcp, "save", broken)
        saver.start(2, state(2), {}, {}, FACTS)
        with pytest.raises(SaveFailed, match="OSError: no disk"):
            saver.start(3, state(3), {}, {}, FACTS)
    assert names(tmp_path) == {"step-00000001", "latest"}
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    saver.start(4, state(4), {}, {}, FACTS)
    saver.close()
    assert steps(tmp_path) == [4, 1]


def test_the_end_waits_for_the_last_save_and_hears_of_its_failure(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(Store(tmp_path))
    tensors = state(1)
    tensors["model"]["gate"] = torch.tensor(float("nan"))
    saver.start(1, tensors, {}, {}, FACTS)
    with pytest.raises(SaveFailed, match=r"model\.gate"):
        saver.close()
    other = Saver(Store(tmp_path))
    other.start(2, state(2), {}, {}, FACTS)
    threading.Timer(0.1, gate.set).start()
    other.close()
    assert steps(tmp_path) == [2]


def test_without_a_thread_a_save_is_done_when_start_returns(tmp_path: Path) -> None:
    saver = Saver(Store(tmp_path), asynchronous=False)
    saver.start(1, state(1), {}, {}, FACTS)
    assert steps(tmp_path) == [1]
    with pytest.raises(SaveFailed):
        saver.start(2, {"model": {"a": torch.tensor(float("nan"))}}, {}, {}, FACTS)
    saver.close()
