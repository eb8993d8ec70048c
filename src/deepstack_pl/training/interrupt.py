"""Ctrl-C ends a run in good order: a checkpoint and a report follow.

Lightning's own handling saves nothing by itself and leaves with ``sys.exit``, so that no report is written.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class GracefulStop(lightning.Callback):
    """The first Ctrl-C stops training after the optimiser step in progress, and ``fit`` returns; a second one raises.

    Attributes:
        interrupted: whether somebody asked.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._old: Any = None
        self._installed = False
        self._pid = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # No earlier: Lightning notes the handlers just before, and puts those back after an exception.
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Ctrl-C will not end this run in good order: signals reach the main thread only.")
            return
        self._pid = os.getpid()
        self._old = signal.signal(signal.SIGINT, self._handle)
        self._installed = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a checkpoint in the middle of an accumulation would lose the gradients gathered so far
        if trainer.world_size > 1:  # all ranks or none: whoever went on alone would wait for the others for ever
            self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if self.interrupted:
            trainer.should_stop = True

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker: the main process speaks for all
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # print is not safe inside a handler: it may interrupt another print
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping after this step; Ctrl-C again: at once\n"
        )

    def _restore(self) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._old)
            self._installed = False
