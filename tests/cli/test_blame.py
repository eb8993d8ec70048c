"""What is said, and kept, when one of several processes fails."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deepstack_pl.cli.blame import Ends, LaunchError, Record
from deepstack_pl.cli.ending import is_consequence

BROKEN = {"consequence": True, "text": "RuntimeError: [gloo/transport/tcp/pair.cc:545] Connection closed by peer"}


def ended(folder: Path, codes: list[int], *said: dict[str, Any], asked: int | None = None) -> BaseException:
    for each in said:
        whole = {"time": 0.0, "mendable": False, "consequence": False, **each}
        (folder / f"error-{each['rank']}.json").write_text(json.dumps(whole))
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # which it is, is what is looked at
        Ends(folder, folder, 100.0, codes).require(asked)
    return caught.value


def test_what_went_wrong_first_is_said_and_not_what_followed_from_it(tmp_path: Path) -> None:
    cause = {"rank": 1, "time": 2.0, "text": "ZeroDivisionError: division by zero"}
    error = ended(tmp_path, [1, 1], {"rank": 0, "time": 1.0, **BROKEN}, cause)
    assert str(error) == "process 1: ZeroDivisionError: division by zero"


def test_of_nothing_but_consequences_the_first_is_said(tmp_path: Path) -> None:
    error = ended(tmp_path, [1, 1], {"rank": 0, "time": 2.0, **BROKEN}, {"rank": 1, "time": 1.0, **BROKEN})
    assert str(error) == f"process 1: {BROKEN['text']}"


def test_what_all_say_is_said_once_and_names_nobody(tmp_path: Path) -> None:
    same = [{"rank": rank, "time": float(rank), "mendable": True, "text": "seed=-1"} for rank in (0, 1)]
    error = ended(tmp_path, [1, 1], *same)
    assert isinstance(error, ValueError)
    assert str(error) == "seed=-1"


@pytest.mark.parametrize(("time", "where"), [(101.0, " in step 7 (forward and backward)"), (99.0, "")])
def test_a_process_that_was_killed_is_named_with_where_this_start_was(tmp_path: Path, time: float, where: str) -> None:
    (tmp_path / "logs").mkdir()
    beat = {"step": 7, "phase": "forward and backward", "samples": [], "time": time}
    (tmp_path / "logs" / "heartbeat-1.json").write_text(json.dumps(beat))
    error = ended(tmp_path, [1, -signal.SIGKILL], {"rank": 0, **BROKEN})
    assert re.match(rf"process 1 was ended by SIGKILL{re.escape(where)}\. What", str(error))


@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_that_was_asked_and_one_that_missed_it_were_both_stopped(tmp_path: Path, asked: int, status: int) -> None:
    error = ended(tmp_path, [status, 1], {"rank": 1, **BROKEN}, asked=asked)
    assert isinstance(error, SystemExit if status == 143 else KeyboardInterrupt)


def test_a_cause_is_said_even_though_somebody_had_asked(tmp_path: Path) -> None:
    error = ended(tmp_path, [143, 1], {"rank": 1, "text": "ZeroDivisionError"}, asked=signal.SIGTERM)
    assert isinstance(error, LaunchError)


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (torch.distributed.DistStoreError("wait timeout after 1000ms"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer"), True),
        (RuntimeError("DataLoader timed out after 30 seconds"), False),
        (ConnectionError("HTTPSConnectionPool: Read timed out. Connection refused"), False),
        (OSError(32, "Broken pipe", "data/gloo/a.tar"), False),
    ],
)
def test_a_consequence_is_known_by_its_kind_and_not_by_a_word(error: Exception, follows: bool) -> None:
    assert is_consequence(error) is follows
    outer = RuntimeError("the weights could not be shared out")
    outer.__cause__ = error
    assert is_consequence(outer) is follows


def results(folder: Path, status: str, starts: int = 1) -> dict[str, Any]:
    values = {"status": status, "reason": "RuntimeError: Connection closed", "starts": [{}] * starts, "steps": 3}
    (folder / "results.json").write_text(json.dumps(values))
    return values


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("left", ["running", "failed"])
def test_results_keep_the_cause_and_not_the_connection_error_of_another(tmp_path: Path, left: str) -> None:
    record = Record.before(tmp_path)
    results(tmp_path, left)
    record.close(LaunchError("process 1: Traceback ...\n  x = 1 / 0\nZeroDivisionError: division by zero\n"))
    found = read(tmp_path)
    assert (found["status"], found["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    record.close(LaunchError("process 1 was ended by SIGKILL in step 2 (update)"))
    assert read(tmp_path)["reason"] == "process 1 was ended by SIGKILL in step 2 (update)"
    assert read(tmp_path)["steps"] == 3


def test_a_run_that_was_stopped_is_interrupted_in_the_words_of_process_0_if_it_had_some(tmp_path: Path) -> None:
    record = Record.before(tmp_path)
    results(tmp_path, "running")
    record.close(SystemExit(143))
    assert read(tmp_path)["status"] == "interrupted"
    before = results(tmp_path, "interrupted")
    record.close(KeyboardInterrupt())
    assert read(tmp_path) == before


def test_a_start_that_was_refused_changes_nothing_of_the_one_before(tmp_path: Path) -> None:
    before = results(tmp_path, "finished")
    Record.before(tmp_path).close(ValueError("its data are not those of the checkpoint"))
    assert read(tmp_path) == before
