"""What happens to one of two processes, and what becomes of the run: nothing is lost, nobody waits for ever."""

import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_fits import STEPS, one_fit
from small_run import newest

from deepstack_pl.training.checkpoints import all_of, verify

SCRIPT = Path(__file__).with_name("faulty_fits.py")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TERMS = [
    {"name": f"term-{at}", "fault": "term", "at": at, "kind": kind}
    for at, kind in zip((0, 1, 2, 3, 4), ("ddp", "fsdp") * 3, strict=False)
]
TOGETHER: list[dict[str, Any]] = [
    *TERMS,
    {"name": "one-asked", "fault": "term", "where": 1},
    {"name": "nan", "fault": "nan", "where": 1, "every": 2, "kind": "fsdp"},
    {"name": "nan-skipped", "fault": "nan", "where": 1, "nonfinite": "skip", "kind": "fsdp"},
    {"name": "apart", "fault": "apart", "where": 1},
    *(
        phase
        for kind in ("ddp", "fsdp")
        for phase in (
            {"name": f"{kind}-whole", "kind": kind, "dropout": 0.3},
            {"name": f"{kind}-first", "kind": kind, "dropout": 0.3, "until": 2},
            {"name": f"{kind}-second", "kind": kind, "dropout": 0.3, "resume": f"{kind}-first", "until": 3},
            {"name": f"{kind}-third", "kind": kind, "dropout": 0.3, "resume": f"{kind}-second"},
        )
    ),
    {"name": "dry", "kind": "fsdp"},
    {"name": "two-first", "kind": "fsdp", "until": 2},
    {"name": "from-one", "kind": "fsdp", "resume": "one-first", "until": 4},
]


def several(folder: Path, phases: list[dict[str, Any]], **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    return subprocess.run(
        [*words, str(folder), json.dumps(phases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / name).glob("rank-*.json"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fit of two processes that both survive, one group for all; before them one of one, to go on with."""
    found = tmp_path_factory.mktemp("faults")
    one_fit(found, "one-first", kind="single", until=2)
    done = several(found, TOGETHER)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one_fit(found, "to-one", kind="single", resume="two-first", until=4)
    one_fit(found, "one", kind="single")
    return found


@pytest.mark.parametrize("name", [phase["name"] for phase in TERMS] + ["one-asked"])
def test_a_sigterm_to_any_ends_all_in_the_same_step_with_a_checkpoint(folder: Path, name: str) -> None:
    first, second = told(folder, name)
    assert first["preempted"]
    assert second["preempted"]
    assert first["step"] == second["step"] < STEPS
    checkpoint = all_of(folder / name)[0]
    assert checkpoint.step == first["step"]
    assert not verify(checkpoint)


def test_a_loss_that_is_no_number_on_one_process_stops_both_before_the_update(folder: Path) -> None:
    first, second = told(folder, "nan")
    assert first["error"] == second["error"]
    assert "step 4: the loss is nan" in first["error"]
    keys = [*first["keys"][2], *second["keys"][2]]
    assert keys, "the steps before were made"
    for key in ("optim.nonfinite=skip", "No weight was changed"):
        assert key in first["error"]
    assert [checkpoint.step for checkpoint in all_of(folder / "nan")] == [2]


def test_or_is_left_out_by_both_and_written_down(folder: Path) -> None:
    for number, found in enumerate(told(folder, "nan-skipped")):
        assert found["error"] is None
        assert found["step"] == STEPS
        ((step, keys),) = found["skipped"]
        assert step == 3
        assert len(keys) == 4
        ledger = folder / "nan-skipped" / ("ledger.jsonl" if number == 0 else f"ledger-{number}.jsonl")
        lines = [json.loads(line) for line in ledger.read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 3]
        assert {line["key"] for line in lines} <= set(keys)
    weights = torch.load(folder / "nan-skipped" / "weights.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_processes_that_have_come_apart_say_how(folder: Path) -> None:
    for found in told(folder, "apart"):
        assert "have come apart: they differ in micro-batches (process 0 [4]; process 1 [5])" in found["error"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_gone_on_with_twice_is_the_undisturbed_one_to_the_bit(folder: Path, kind: str) -> None:
    """Dropout on; with three steps an epoch the cuts lie in the middle of an epoch and at its end."""
    parts = [told(folder, f"{kind}-{part}") for part in ("first", "second", "third")]
    for number, whole in enumerate(told(folder, f"{kind}-whole")):
        assert [key for part in parts for key in part[number]["keys"]] == whole["keys"]
        assert [loss for part in parts for loss in part[number]["losses"]] == whole["losses"]
    one, other = (
        torch.load(folder / f"{kind}-{part}" / "weights.pt", weights_only=True) for part in ("whole", "third")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    dry = torch.load(folder / "dry" / "weights.pt", weights_only=True)
    assert any(not torch.equal(one[name], dry[name]) for name in one), "dropout was on"


@pytest.mark.parametrize(("after", "world"), [("from-one", 2), ("to-one", 1)])
def test_another_number_of_processes_goes_on_with_the_same_samples_and_losses(
    folder: Path, after: str, world: int
) -> None:
    (whole,), found = told(folder, "one"), told(folder, after)
    assert len(found) == world
    steps = [sorted(chain.from_iterable(each["keys"][step] for each in found)) for step in (0, 1)]
    assert steps == [sorted(keys) for keys in whole["keys"][2:4]]
    assert found[0]["losses"] == pytest.approx(whole["losses"][2:4], abs=1e-6)


def test_a_process_that_dies_takes_the_other_with_it_and_the_checkpoint_stays(tmp_path: Path) -> None:
    done = several(tmp_path, [{"name": "dies", "fault": "die", "where": 1, "at": 4, "every": 2}])
    assert done.returncode != 0
    (found,) = told(tmp_path, "dies")
    assert "onnection" in found["error"]
    assert not verify(all_of(tmp_path / "dies")[0])
    assert all_of(tmp_path / "dies")[0].step in (2, 4), "the second may not have been written to its end"


def test_a_process_that_hangs_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    fits = json.dumps([{"name": "hangs", "fault": "hang", "where": 1, "at": 3, "every": 2}])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PATIENCE": "5"}
    first, second = (
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), fits],
            env={**os.environ, "OMP_NUM_THREADS": "1", **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    )
    try:
        first.wait(timeout=120)
        assert second.poll() is None, "it hangs on; what started both ends it"
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    found = json.loads((tmp_path / "hangs" / "rank-0.json").read_text())
    assert "imed out" in found["error"]
    assert newest(tmp_path / "hangs").name.endswith("2")


@pytest.mark.parametrize("where", [0, 1])
def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path, where: int) -> None:
    fits = [
        {"name": "killed", "fault": "killed saving", "where": where, "every": 2, "kind": "fsdp", "asynchronous": False}
    ]
    assert several(tmp_path, fits).returncode != 0
    assert [checkpoint.step for checkpoint in all_of(tmp_path / "killed")] == [2]
    one_fit(tmp_path, "killed-on", kind="single", resume="killed")
    assert told(tmp_path, "killed-on")[0]["step"] == STEPS
