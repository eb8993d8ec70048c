"""A run that is asked to end does so in good order, all its processes at the same step: a checkpoint follows.

Lightning's own handling saves inside the handler, where one process may wait for another that is somewhere else; and
leaves with ``sys.exit`` after a Ctrl-C, so that no report is written.
"""

import os
import signal
import sys
import threading
import zlib
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from deepstack_pl.processes import from_all, most, rank, several
from deepstack_pl.training.config import PREEMPTED

# SIGUSR1 is what SLURM's --signal is told by custom, some minutes before the end of a job.
_PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)
_STOP, _PREEMPT = 1, 2


class GracefulStop(lightning.Callback):
    """The first Ctrl-C, SIGTERM or SIGUSR1, on any process, stops training after the optimiser step in progress, and
    ``fit`` returns; a second one ends the process at once.

    With every step the processes also make sure that they are in the same one, of the same data.

    Attributes:
        interrupted: whether somebody asked.
        preempted: it was not a Ctrl-C: the machine is wanted for something else, and time is short.
    """

    def __init__(self) -> None:
        self.interrupted = self.preempted = False
        self._asked = 0
        self._old: dict[signal.Signals, Any] = {}
        self._pid = 0
        self._batches = 0
        self._data = 0

    @property
    def asked(self) -> bool:
        """Whether this process was asked; the others hear of it at the end of the step."""
        return bool(self._asked)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in a connector
        identity = {} if data is None else data.identity()
        self._data = zlib.crc32(repr(sorted(identity.items())).encode())
        self._batches = 0

        without_lightnings_handlers(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Ctrl-C will not end this run in good order: signals reach the main thread only.")
            return
        self._pid = os.getpid()
        for number in (signal.SIGINT, *_PREEMPTING):
            self._old[number] = signal.signal(number, self._handle)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batches += 1
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a checkpoint in the middle of an accumulation would lose the gradients gathered so far
        asked = self._agree(trainer.global_step)
        if asked:
            self.interrupted, self.preempted = True, asked == _PREEMPT
            trainer.should_stop = True

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._restore()  # the last checkpoint is written by now
        if most(self._asked)[0] == _PREEMPT:  # after the last step too: what would follow takes time
            self.interrupted = self.preempted = True

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _agree(self, step: int) -> int:
        """What any process was asked; all take the same step, or all stop.

        Raises:
            RuntimeError: they are not where they should be.
        """
        where = {"step": step, "micro-batches": self._batches, "data": self._data}
        asked, *found = most(self._asked, *where.values(), *(-value for value in where.values()))
        largest, smallest = found[: len(where)], [-value for value in found[len(where) :]]
        if largest != smallest:
            every = from_all(where)
            apart = [name for name, a, b in zip(where, largest, smallest, strict=True) if a != b]
            told = "; ".join(f"process {n} {[each[name] for name in apart]}" for n, each in enumerate(every))
            raise RuntimeError(
                f"the processes have come apart: they differ in {', '.join(apart)} ({told}). Do all machines run the "
                "same code, on the same data? Go on from the last checkpoint."
            )
        return asked

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker: the main process speaks for all
        if self._asked:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(PREEMPTED)
        self._asked = _STOP if signum == signal.SIGINT else _PREEMPT
        if several() and rank():
            return  # process 0 says it
        said = "Ctrl-C again" if signum == signal.SIGINT else f"{signal.Signals(signum).name}: the next one"
        # print is not safe inside a handler: it may interrupt another print
        text = f"\nstopping after this step; {said}: at once\n".encode()
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


def without_lightnings_handlers(trainer: lightning.Trainer) -> None:
    """What signals do is said here and outside of ``fit``: Lightning's own handler of SIGTERM would speak to the other
    processes from wherever this one happens to be. It puts the handler in place just before training, after every hook.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
