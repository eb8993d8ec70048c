"""Signs of life, and what is written when they stop."""

import json
import re
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from small_run import Pages, small_module, small_processor, small_trainer

from deepstack_pl.data.config import DataConfig
from deepstack_pl.training.config import StrategyConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.watchdog import Watchdog


class Pause(lightning.Callback):
    """Nothing happens for ``seconds`` in step 2."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            time.sleep(self.seconds)


def fit(folder: Path, *callbacks: lightning.Callback) -> Any:
    module, config = small_module(steps=3), DataConfig(name="x", batch_size=2, workers=0)
    data = DeepStackDataModule(Pages(), Pages(4), small_processor(), config, 0, 3)
    small_trainer(folder, 3, callbacks=list(callbacks)).fit(module, datamodule=data)
    return module


def test_a_stall_is_told_once_with_the_step_the_samples_and_every_stack(tmp_path: Path, capfd: Any) -> None:
    watchdog = Watchdog(tmp_path, StrategyConfig(name="single", stall=1.5))
    fit(tmp_path, watchdog, Pause(4))
    assert watchdog.stalls == 1
    said = capfd.readouterr().err
    assert "process 0 has made no batch for " in said
    assert " s: step 1, forward and backward, samples page" in said
    assert "in on_train_batch_start" in (tmp_path / "logs" / "stack-0.txt").read_text()
    beat = json.loads((tmp_path / "logs" / "heartbeat-0.json").read_text())
    assert beat["step"] >= 1
    assert beat["samples"]


def test_it_changes_no_weight_and_says_nothing_where_all_goes_on(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "a", StrategyConfig(name="single"))
    watched, alone = fit(tmp_path / "a", watchdog), fit(tmp_path / "b")
    assert watchdog.stalls == 0
    for (name, one), other in zip(watched.network.named_parameters(), alone.network.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert watchdog._thread is None


def test_a_disk_that_is_full_ends_no_watch(tmp_path: Path, capfd: Any) -> None:
    """A file where the folder should be; it is no matter which OSError it is."""
    (tmp_path / "logs").write_text("")
    watchdog = Watchdog(tmp_path, StrategyConfig(name="single", stall=1.5))
    fit(tmp_path / "elsewhere", watchdog, Pause(4))
    said = capfd.readouterr().err
    assert said.count("process 0 cannot write") == 1
    assert watchdog.stalls == 1
    assert "process 0 has made no batch for " in said
    assert "in on_train_batch_start" in said, "the stacks, which found no place elsewhere"


class OutOfMemory(lightning.Callback):
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_batch_that_memory_was_too_small_for_is_named_with_its_size(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, Watchdog(tmp_path, StrategyConfig(name="single")), OutOfMemory())
    said = capfd.readouterr().err
    assert re.search(r"out of memory in step 1, forward and backward: 2 rows of \d+ positions, samples page \d+", said)
    assert "Lower data.micro_batch_size" in said


class OutOfMemoryElsewhere(lightning.Callback):
    """In ``hook``, which the watchdog sees before, as it does the run's evaluation."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_memory_that_runs_out_before_training_is_what_ends_the_run(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, Watchdog(tmp_path, StrategyConfig(name="single")), OutOfMemoryElsewhere("on_fit_start"))
    assert "ran out of memory" not in capfd.readouterr().err, "there is no step that it could be in"


@pytest.mark.parametrize(
    ("hook", "where"),
    [
        ("on_train_batch_end", "step 1, between batches"),
        ("on_train_end", "step 3, between batches"),
        ("on_train_epoch_start", "step 0, start"),
    ],
)
def test_memory_that_runs_out_between_batches_is_not_blamed_on_one(
    hook: str, where: str, tmp_path: Path, capfd: Any
) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, Watchdog(tmp_path, StrategyConfig(name="single")), OutOfMemoryElsewhere(hook))
    said = capfd.readouterr().err
    assert f"ran out of memory in {where}: no batch was being trained on" in said
    assert "positions" not in said
    assert "samples" not in said


def test_the_first_sign_of_life_replaces_that_of_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "heartbeat-0.json").write_text(json.dumps({"step": 900, "phase": "update", "time": 1.0}))
    fit(tmp_path, Watchdog(tmp_path, StrategyConfig(name="single")))
    assert json.loads((tmp_path / "logs" / "heartbeat-0.json").read_text())["step"] <= 3
