"""What a person watches: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from torch import Tensor


def progress(every_steps: int = 10) -> ProgressBar:
    """A bar where standard output is a terminal, else a line every ``every_steps`` steps."""
    return TrainingBar() if sys.stdout.isatty() else LogLine(every_steps)


class TrainingBar(RichProgressBar):
    """Lightning's rich bar (step, time passed, time left) with short, readable numbers."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {**readable(trainer)}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # there are steps here, no epochs


class LogLine(ProgressBar):
    """A line at the first and at every ``every_steps``-th step, in the place of Lightning's own bar."""

    def __init__(self, every_steps: int = 10) -> None:
        super().__init__()
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: print every 1 or more steps.")
        self.every_steps = every_steps
        self._enabled = True
        self._start = 0.0
        self._first = 0
        self._printed = -1

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start, self._first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == self._first + 1
        if self._enabled and due and step not in (self._first, self._printed):
            self._printed = step
            self.print(self.line(trainer), flush=True)

    def line(self, trainer: lightning.Trainer) -> str:
        """Where the run stands, on one line."""
        step, passed = trainer.global_step, time.monotonic() - self._start
        left = timedelta(seconds=round(passed / (step - self._first) * (trainer.max_steps - step)))
        numbers = [f"{name} {value}" for name, value in readable(trainer).items()]
        return "  ".join([f"step {step}/{trainer.max_steps}", *numbers, f"left {left}"])


def readable(trainer: lightning.Trainer) -> dict[str, str]:
    """The progress bar's numbers as text; Lightning's version number is not among them."""
    return {name: _text(name, float(value)) for name, value in trainer.progress_bar_metrics.items()}


def _text(name: str, value: float) -> str:
    if name in ("wait", "pad", "mfu"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
