"""When a run is saved: every so many steps, and at its end, wherever that is."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from deepstack_pl.processes import several
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.random_state import restore_random_state
from deepstack_pl.training.store import SaveFailed, Saver, Store
from deepstack_pl.training.strategies import Stored

_PATIENCE = 60.0  # seconds, after an exception, for a save that others may have given up
_FAILURES = 3  # saves in a row that may fail before the run stops: until then what is trained is not thrown away


class RunCheckpoint(Checkpoint):
    """A checkpoint in ``folder`` every ``every_steps`` steps and at the end; the newest ``keep`` stay.

    With ``asynchronous`` training goes on while one is written. Either way one that cannot be written is warned of, and
    the run stops at the third in a row, or if it is the last. After an exception the last step that was made is saved
    too, if there is one process: several could not be sure of each other.
    """

    def __init__(
        self,
        folder: str | Path,
        every_steps: int = 100,
        keep: int = 2,
        asynchronous: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: save every 1 or more steps.")
        self.store = Store(Path(folder), keep=keep)
        self.every_steps = every_steps
        self.asynchronous = asynchronous
        self.facts = dict(facts or {})
        self._saver: Saver | None = None
        self._saved = -1  # the step of the newest save
        self._failures = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, Stored), "checkpoints need a strategy of training/strategies.py"
        self._saver = strategy.saver = Saver(self.store, asynchronous=self.asynchronous)
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in a connector
        strategy.facts = {**self.facts, **({} if data is None else {"data": data.identity()})}
        self._saved, self._failures = -1, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(trainer.strategy, Stored)
        if trainer.strategy.random is not None:
            restore_random_state(trainer.strategy.random)
        if trainer.global_step:
            self._saved = trainer.global_step  # it is what was loaded

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.global_step % self.every_steps:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer, last=True)
        self._wait(last=True)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self._saver is None:
            return
        with contextlib.suppress(SaveFailed, TimeoutError, RuntimeError):  # what ends the run is what must be said
            self._saver.wait(_PATIENCE if several() else None)
        assert isinstance(pl_module, DeepStackModule)
        consistent = trainer.optimizers and trainer.global_step and not pl_module.updating
        if consistent and not several() and not isinstance(exception, SaveFailed):
            try:
                self._save(trainer, last=True)
                self._wait(last=True)
            except SaveFailed as error:  # not in the place of what ends the run
                rank_zero_warn(str(error))

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._saver is not None:
            self._saver.close()

    def _save(self, trainer: lightning.Trainer, *, last: bool = False) -> None:
        step = trainer.global_step
        if step == self._saved:
            return
        self._wait(last=False)  # for the one before, so that all processes hear of its failure in the same step
        self._saved = step
        try:
            trainer.save_checkpoint(self.store.folder / f"step {step}", weights_only=False)
        except SaveFailed as error:
            self._failed(error, last=last)
        else:
            if not self.asynchronous:  # else it is begun, and nobody knows
                self._failures = 0

    def _wait(self, *, last: bool) -> None:
        assert self._saver is not None
        try:
            if self._saver.wait():
                self._failures = 0
        except SaveFailed as error:
            self._failed(error, last=last)

    def _failed(self, error: SaveFailed, *, last: bool) -> None:
        self._failures += 1
        self._saved = -1  # the last step's is tried once more at the end
        if last or self._failures >= _FAILURES:
            raise error
        rank_zero_warn(f"{error} Training goes on; the next checkpoint is due in {self.every_steps} steps.")
