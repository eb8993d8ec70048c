"""Two processes save and read together: in shares, with another number, and with one that cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_states import FACTS, equal, whole_state

from deepstack_pl.training.checkpoints import all_of, newest
from deepstack_pl.training.restore import read_mine, read_model, read_tensors
from deepstack_pl.training.store import Store

SCRIPT = Path(__file__).with_name("stored_states.py")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def two(folder: Path, phase: str) -> list[tuple[int, str]]:
    """The exit status of each, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), phase],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, words) for process, words in zip(both, said, strict=True)]


def told(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{phase}-*.json"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saved, and what two made of it and saved themselves; then their faults."""
    found = tmp_path_factory.mktemp("stored")
    Store(found / "one").write(5, whole_state(5.0), {}, {"rank": 0}, FACTS)
    for phase in ("healthy", "faults"):
        for status, said in two(found, phase):
            assert status == 0, said[-3000:]
    return found


def test_two_processes_read_what_one_saved_each_its_share(folder: Path) -> None:
    first, second = told(folder, "healthy")
    assert first["from one"]
    assert second["from one"]
    assert first["mine of one"] == {"rank": 0}
    assert second["mine of one"] is None


def test_two_processes_save_what_was_true_when_they_began_each_its_share(folder: Path) -> None:
    for number, there in enumerate(told(folder, "healthy")):
        assert there["from two"]
        assert there["mine"] == {"rank": number}
        assert there["share"] == []
        assert there["world"] == 2
        assert {"__0_0.distcp", "__1_0.distcp", "process-0.pt", "process-1.pt"} < set(there["files"])


def test_one_process_reads_what_two_saved(folder: Path) -> None:
    checkpoint, passed = newest(folder / "two", deep=True)
    assert checkpoint is not None
    assert passed == []
    found = whole_state(0.0)
    read_tensors(checkpoint, found)
    assert equal(found, 8.0)
    weights = read_model(checkpoint)
    assert weights.keys() == found["model"].keys()
    assert all(torch.equal(weights[name], found["model"][name]) for name in weights)
    assert read_mine(checkpoint, 1) == {"rank": 1}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("writer", "Process 1: OSError: no disk."),
        ("own", "Process 1: UnpicklingError: Weights only load failed"),
        ("nan", "Process 1: ValueError: model.weight holds a number that is not finite."),
        ("full", "Process 1: OSError: [Errno 27] File too large."),
    ],
)
def test_what_fails_on_one_process_fails_on_all_in_the_same_words(folder: Path, fault: str, said: str) -> None:
    first, second = told(folder, "faults")
    assert first[fault] == second[fault]
    assert said in first[fault]


def test_a_failure_leaves_the_checkpoint_before_and_the_next_save_goes_well(folder: Path) -> None:
    for there in told(folder, "faults"):
        assert there["before"] == there["after"] == "saved"
        assert there["left"] == ["latest", "step-00000001"]
    assert [checkpoint.step for checkpoint in all_of(folder / "faults")] == [3, 1]


def test_a_process_killed_in_a_save_ends_the_others_and_spoils_nothing(tmp_path: Path) -> None:
    (_, said), (status, _) = two(tmp_path, "killed")
    assert status == -signal.SIGKILL
    (survivor,) = told(tmp_path, "killed")
    assert survivor["error"] != "SaveFailed", said
    assert survivor["left"] == ["latest", "step-00000001"]
    checkpoint, passed = newest(tmp_path / "killed", deep=True)
    assert checkpoint is not None
    assert (checkpoint.step, passed) == (1, [])
