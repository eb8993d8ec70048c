"""Where the time of a step goes: data, the tower, projector and dealing, the LLM, the loss, the optimiser."""

from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.processes import from_all, several
from deepstack_pl.training.clock import PARTS, StepClock
from deepstack_pl.training.loader import TimedLoader
from deepstack_pl.training.module import DeepStackModule


class StepSplit(lightning.Callback):
    """Logs, every ``every_steps`` steps, the seconds that one step spent on each of `PARTS`: ``split/vision`` and so
    on, forward and backward together, the mean over all processes; of several also ``split_min`` and ``split_max``.

    On a GPU the times are the device's own. Between measured steps nothing is watched, and no number of the run ever
    depends on it.

    Attributes:
        last: the newest measured step's values, by part.
    """

    def __init__(self, every_steps: int = 50) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: measure every 1 or more steps.")
        self.every_steps = every_steps
        self.last: dict[str, float] = {}
        self._clock = StepClock()
        self._waited = self._waited_before = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: MultimodalBatch, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        waited = loader.waited if isinstance(loader, TimedLoader) else 0.0
        waited, self._waited_before = waited - self._waited_before, waited
        if (trainer.global_step + 1) % self.every_steps:
            return
        assert isinstance(pl_module, DeepStackModule)
        self._waited += waited
        if not self._clock.watching:
            self._clock.watch(pl_module.network)
        self._clock.mark("start")

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._clock.watching:
            self._clock.mark("backward")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        if not self._clock.watching:
            return
        self._clock.mark("end")
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        mine, self._waited = self._clock.read(self._waited), 0.0
        every = from_all(mine)
        self.last = {part: sum(each[part] for each in every) / len(every) for part in PARTS}
        logged = {f"split/{part}": value for part, value in self.last.items()}
        if several():
            for name, of in (("min", min), ("max", max)):
                logged |= {f"split_{name}/{part}": of(each[part] for each in every) for part in PARTS}
        for logger in trainer.loggers:  # of a single step: log() would average it with others
            logger.log_metrics(logged, step=trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._clock.let_go()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._clock.let_go()
