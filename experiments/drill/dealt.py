"""A witness of what training was dealt: a line for every micro-batch that was trained on."""

import json
import os
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor


class Dealt(lightning.Callback):
    """Appends every micro-batch that was trained on to ``file``: optimiser step, its number in that step, the samples,
    the loss to the last bit. A line is one write, so that a kill leaves no half of one.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self._handle: int | None = None
        self._at = (-1, 0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, micro = self._at
        self._at = (trainer.global_step, micro + 1 if step == trainer.global_step else 0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._handle is not None
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        assert isinstance(loss, Tensor)
        line = {"at": self._at, "keys": batch.keys, "loss": loss.item().hex()}
        os.write(self._handle, (json.dumps(line) + "\n").encode())
