"""Signs of life of every process, and what it was doing when they stopped. Changes no weight and no random number."""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.processes import rank, wait_for
from deepstack_pl.training.config import StrategyConfig

_WARM = 10  # steps after which nothing is compiled, measured or fetched any more
_EVERY = 5.0  # seconds between two signs of life
_FORWARD, _UPDATE = "forward and backward", "update"
_BETWEEN = "between batches"  # evaluation and checkpoints, too


class Watchdog(lightning.Callback):
    """Writes ``logs/heartbeat-N.json`` of process N every few seconds: step, phase, the last batch's samples, time.
    After ``strategy.stall`` seconds without a batch it writes the stacks of all threads to ``logs/stack-N.txt``, and
    says so.

    Once training is warm, processes wait for each other for ``strategy.timeout`` seconds, no more.

    Attributes:
        stalls: how often it said so.
    """

    def __init__(self, folder: Path, strategy: StrategyConfig) -> None:
        self.folder = folder / "logs"
        self.strategy = strategy
        self.stalls = 0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._beat: dict[str, Any] = {}
        self._last = 0.0
        self._done = 0
        self._unwritten = False
        self._size = (0, 0)  # rows and positions of the batch

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._over.clear()
        self._done = 0
        self._at("start", trainer.global_step)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: MultimodalBatch, batch_idx: int
    ) -> None:
        self._size = tuple(batch.input_ids.shape)
        self._at(_FORWARD, trainer.global_step, batch.keys)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._at(_UPDATE, trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._at(_BETWEEN, trainer.global_step)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._done += 1
        if self._done == _WARM:
            wait_for(self.strategy.timeout)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()
        wait_for(self.strategy.start_timeout)  # weights are gathered and written, and each evaluates its share

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop()
        if isinstance(exception, torch.OutOfMemoryError) and self._beat:  # else it was before training
            _say(f"process {rank()} ran out of memory in step {self._beat['step']}, {self._why()}\n")

    def _why(self) -> str:
        """Where memory was too small; a batch that is done is not named for what came after it."""
        phase, samples = self._beat["phase"], ", ".join(self._beat["samples"][:3])
        if phase not in (_FORWARD, _UPDATE):
            return (
                f"{phase}: no batch was being trained on. The traceback says what asked for it; where that is "
                "evaluation, lower evaluation.batch_size."
            )
        rows, positions = self._size
        return (
            f"{phase}: {rows} rows of {positions} positions, samples {samples}. Lower data.micro_batch_size; "
            "dry_run=step tries the worst batch there can be."
        )

    def _at(self, phase: str, step: int, keys: list[str] | None = None) -> None:
        self._last = time.monotonic()
        self._beat = {
            "step": step,
            "phase": phase,
            "samples": keys or self._beat.get("samples", []),
            "time": time.time(),
        }

    def _watch(self) -> None:
        """The thread: life goes on as long as batches do."""
        told = 0.0
        self._write()
        while not self._over.wait(min(_EVERY, self.strategy.stall / 4)):
            self._write()
            limit = self.strategy.stall * (4 if self._beat["phase"] == _BETWEEN else 1)
            if time.monotonic() - self._last > limit and told != self._last:
                told = self._last
                self._tell()

    def _write(self) -> None:
        """A disk that is full ends no watch: it is said once, and tried again."""
        try:
            self._put()
        except OSError as error:
            if not self._unwritten:
                _say(f"process {rank()} cannot write {self.folder}: {error.strerror}; it stays on watch\n")
            self._unwritten = True

    def _put(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"heartbeat-{rank()}.json"
        draft = file.with_name(f".{file.name}")
        draft.write_text(json.dumps(self._beat), encoding="utf-8")
        draft.replace(file)

    def _tell(self) -> None:
        self.stalls += 1
        file = self.folder / f"stack-{rank()}.txt"
        try:
            with file.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError:  # said by _write; then the stacks are on the terminal
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        beat = self._beat
        silent = time.monotonic() - self._last
        text = (
            f"process {rank()} has made no batch for {silent:.1f} s: step {beat['step']}, {beat['phase']}, "
            f"samples {', '.join(beat['samples'][:3]) or 'none yet'}. Where it stands: {file}\n"
        )
        _say(text)

    def _stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _say(text: str) -> None:
    """From a thread, past whoever holds the lock of ``print``."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
