"""Signals that come outside of training, to one process and to those that are being started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
from tiny_run import results_of, start

from deepstack_pl.cli import ending, launch, worker
from deepstack_pl.cli import run as cli_run
from deepstack_pl.cli.ending import ending_at_once
from deepstack_pl.training.checkpoints import all_of
from deepstack_pl.training.config import StrategyConfig
from deepstack_pl.training.datamodule import DeepStackDataModule

ASLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sending(number: int) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("during", ["spread", "evaluate"])
def test_a_signal_before_or_after_training_ends_the_run_with_143_and_a_word(
    number: int, during: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_run, during, sending(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        start(folder=Path("run"))
    assert ended.value.code == 143
    found = results_of(Path("run"))
    assert (found["status"], found["interrupted"]) == ("interrupted", True)
    assert found["reason"] == "stopped at once because the machine was wanted"
    assert f"stopping at once: {signal.Signals(number).name}" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_signal_while_the_last_checkpoint_is_written_leaves_out_the_evaluation() -> None:
    with pytest.raises(SystemExit) as ended:
        start("+callbacks.late={_target_: tiny_run.Preempted}", folder=Path("run"))
    assert ended.value.code == 143
    found = results_of(Path("run"))
    assert (found["status"], found["steps"]) == ("interrupted", 3)
    assert "metrics" not in found or not found["metrics"]
    assert all_of(Path("run") / "checkpoints")[0].step == 3


def test_lightnings_own_handler_is_never_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be when the data are opened, between Lightning's preparations and the first hook of training."""
    found: list[Any] = []
    opened = DeepStackDataModule.train_dataloader

    def noted(self: DeepStackDataModule) -> Any:
        found.append(signal.getsignal(signal.SIGTERM))
        return opened(self)

    monkeypatch.setattr(DeepStackDataModule, "train_dataloader", noted)
    start(folder=Path("run"))
    assert [handler.__module__ for handler in found] == [ending.__name__]


def test_a_forked_data_worker_leaves_it_to_the_main_process_and_ends_by_sigterm() -> None:
    with ending_at_once():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


class Started:
    """Stands in for a process; the second one's start is met by SIGTERM at the launcher."""

    all: list["Started"] = []  # noqa: RUF012

    def __init__(self, *_: object, **__: object) -> None:
        self.received: list[int] = []
        self.all.append(self)
        if len(self.all) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> int | None:
        return None

    def wait(self) -> None: ...

    def kill(self) -> None: ...

    def send_signal(self, number: int) -> None:
        self.received.append(number)


def test_a_signal_while_processes_are_started_reaches_them_all_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=Started))
    monkeypatch.setattr(Started, "all", [])
    with launch._Group(tmp_path, tmp_path) as group:
        group.start(3)
    assert [process.received for process in Started.all] == [[signal.SIGTERM]] * 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_process_that_is_stopped_in_its_first_second_has_no_traceback(
    number: int, status: int, tmp_path: Path
) -> None:
    def stopped_before_it_begins() -> None:
        signal.signal(number, signal.SIG_DFL)  # a shell has its background jobs ignore SIGINT
        launch._before_it_begins()
        os.kill(os.getpid(), number)

    process = subprocess.Popen(
        [sys.executable, "-m", "deepstack_pl.cli.worker", str(tmp_path)],
        env={**os.environ, "RANK": "1"},
        preexec_fn=stopped_before_it_begins,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "")


@pytest.mark.parametrize("status", [130, 143, 1])
def test_who_does_not_follow_the_others_is_ended(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PATIENCE", 0.2)
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    with launch._Group(tmp_path, tmp_path) as group:
        gone = [sys.executable, "-c", f"raise SystemExit({status})"]
        group.processes = [subprocess.Popen(gone), subprocess.Popen(ASLEEP)]
        if status != 1:
            group._sent.append(signal.SIGINT)
        with pytest.raises(RuntimeError if status == 1 else KeyboardInterrupt) as ended:
            group.wait()
        assert ("process 1 hung" in str(ended.value)) is (status == 1)
        assert group.processes[1].returncode == -signal.SIGKILL


def test_a_second_signal_bounds_the_wait_for_processes_that_hear_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    deaf = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(60)"
    with launch._Group(tmp_path, tmp_path) as group:
        group.processes = [subprocess.Popen([sys.executable, "-c", deaf])]
        group._complete = True
        time.sleep(1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            group.wait()


def said_by(raised: Callable[[], Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(worker, "_take_part", lambda *_: raised())
    assert worker.main(folder) == 1
    return json.loads((folder / "error-3.json").read_text())


def test_a_worker_tells_a_refusal_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = said_by(lambda: cli_run.checks.check_trainer(None), tmp_path, monkeypatch)  # type: ignore[arg-type]
    assert not said["mendable"], "an AttributeError is none"
    said = said_by(lambda: StrategyConfig(name="x", stall=0), tmp_path, monkeypatch)
    assert (said["mendable"], said["text"]) == (True, "strategy.stall=0: seconds, more than 0.")


@pytest.mark.parametrize(
    ("raised", "last"),
    [
        (lambda: int("two"), "ValueError: invalid literal for int() with base 10: 'two'"),
        (lambda: sys.exit("a library's own words"), "SystemExit: a library's own words"),
        (lambda: sys.exit(0), "SystemExit: 0"),
        (lambda: next(iter([])), "StopIteration"),
    ],
)
def test_and_everything_else_with_its_traceback(
    raised: Callable[[], Any], last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = said_by(raised, tmp_path, monkeypatch)
    assert not said["mendable"]
    assert said["text"].startswith("Traceback")
    assert said["text"].strip().splitlines()[-1] == last


@pytest.mark.parametrize(("number", "error", "waits"), [(0, "own", 0), (1, "own", 3), (0, "follows", 10)])
def test_of_a_group_who_repeats_or_follows_lets_the_others_speak(
    number: int, error: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=slept.append))
    raised = ValueError("seed=-1") if error == "own" else RuntimeError("gloo/transport: closed")
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ending.wait_to_speak(raised)
    assert not slept, "one alone never waits"
    monkeypatch.setenv("WORLD_SIZE", "2")
    ending.wait_to_speak(raised)
    assert sum(slept) == waits


def test_a_trial_step_keeps_lightnings_handler_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    fit = lightning.Trainer.fit

    def noted(self: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        fit(self, *args, **kwargs)
        found.append(self._signal_connector._original_handlers)
        self._signal_connector.register_signal_handlers()
        found.append(self._signal_connector._original_handlers)

    monkeypatch.setattr(lightning.Trainer, "fit", noted)
    with pytest.raises(FileNotFoundError):
        start("dry_run=step", folder=Path("run"))
    assert found == [{}, {}]
