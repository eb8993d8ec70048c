"""A whole run in this process, small enough for a test: eight pages, six layers."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir

from deepstack_pl.cli.resume import asked_for, prepare
from deepstack_pl.cli.run import execute
from deepstack_pl.config.load import from_hydra, register
from deepstack_pl.config.overrides import parse
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.schema import Schema
from deepstack_pl.training.checkpoints import name_of
from deepstack_pl.training.store import Store

CONF = Path(__file__).parents[2] / "conf"
SMALL = (
    "data.batch_size=4",
    "data.workers=0",
    "data.fine_print.train_pages=8",
    "data.fine_print.val_pages=4",
    "evaluation=final",
    "evaluation.final_samples=4",
    "evaluation.max_new_tokens=20",
    "trainer.max_steps=3",
)
TINY = (*SMALL, "llm.architecture.num_hidden_layers=5", "~logger", "~callbacks.progress")


def run_of(*overrides: str) -> RunConfig:
    """What ``python train.py OVERRIDES`` would run."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("train", list(overrides)))


class CtrlCTwice(lightning.Callback):
    """Somebody who does not want to wait for the end of step 2."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


class Preempted(lightning.Callback):
    """SIGTERM when the last step is done."""

    def on_train_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class StopEarly(lightning.Callback):
    """Ends training before its last step, as EarlyStopping may."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = True


class Slow(lightning.Callback):
    """Half a second before every step: time to be interrupted in."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.5)


class Until(lightning.Callback):
    """The second step waits for ``file``: what is done in the meantime is done to a run that trains."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        while trainer.global_step == 1 and not self.file.exists():
            time.sleep(0.05)


class Killed(lightning.Callback):
    """kill -9 of one process before a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def start(*overrides: str, folder: Path) -> dict[str, Any]:
    """Run it, and read its results."""
    execute(run_of(*TINY, *overrides), folder, "python train.py")
    return results_of(folder)


def go_on(*overrides: str) -> dict[str, Any]:
    """``python train.py ckpt_path=... OVERRIDES``, and the run's results."""
    parsed = parse(overrides)
    wanted = asked_for(parsed)
    assert wanted is not None
    resumed = prepare(wanted, parsed, (), Schema((CONF,)))
    execute(resumed.run, resumed.folder, "python train.py ckpt_path", resumed=resumed)
    return results_of(resumed.folder)


def leave_checkpoint(folder: Path, step: int = 40) -> Path:
    """A checkpoint of ``step`` in the run ``folder``, whole as far as its manifest goes."""
    Store(folder / "checkpoints").write(step, {"model": {"weight": torch.ones(1)}}, {"global_step": step}, {}, {})
    return folder / "checkpoints" / name_of(step)


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())
