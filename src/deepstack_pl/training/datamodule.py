"""Batches for Lightning, and where to go on: one integer in the checkpoint.

The position is the datamodule's and not the loader's: Lightning restores a loader's state only in the middle of an
epoch, and gives rank 0's to every rank.
"""

import hashlib
import json
import warnings
from typing import Any

import lightning

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.sources import Source
from deepstack_pl.data.stream import train_loader
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.training.throughput import TimedLoader


class DeepStackDataModule(lightning.LightningDataModule):
    """Training batches of ``train``, in an order that depends on (seed, step) alone.

    There is no validation loader: validation generates, which is evaluation's callback's own affair; ``val`` is kept
    for it.

    What has been trained on is counted here, batch by batch, and not concluded from Trainer's numbers. A batch counts
    once the optimiser has stepped on it: the gradients of an accumulation broken off are in no checkpoint.
    """

    def __init__(
        self, train: Source, val: Source, processor: DeepStackProcessor, config: DataConfig, seed: int, max_steps: int
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.processor = processor
        self.config = config
        self.seed = seed
        self.max_steps = max_steps
        self._loader: TimedLoader | None = None
        self._begin()

    def _begin(self, step: int = 0, keys_digest: str = "", cut: tuple[int, int] = (0, 0)) -> None:
        self.start_step = self._trained = step
        self._cut, self._cut_pending = cut, (0, 0)  # positions, and samples whose whole answer went
        self._digest = keys_digest
        self._pending: list[list[str]] = []  # keys of batches that the optimiser has not been seen to step on
        self._optimizer_steps = 0

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._begin()  # another fit begins anew; a checkpoint is loaded after this

    @property
    def step(self) -> int:
        """Batches that have been trained on; what workers have fetched ahead does not count."""
        self._count()
        return self._trained

    @property
    def keys_digest(self) -> str:
        """A running hash of the keys of all samples trained on, by batch and optimiser step; empty before the first.

        Equal for two runs that took the same optimiser steps on the same batches, whatever their settings promise.
        """
        self._count()
        return self._digest

    @property
    def cut_positions(self) -> int:
        """Positions that were cut off the samples trained on; 0 unless ``llm.too_long=cut``."""
        self._count()
        return self._cut[0]

    @property
    def cut_answers(self) -> int:
        """Samples trained on of which the cut left nothing to learn."""
        self._count()
        return self._cut[1]

    def on_before_batch_transfer(self, batch: MultimodalBatch, dataloader_idx: int) -> MultimodalBatch:
        """Lightning's last word on a batch before it is trained on."""
        if self.trainer is not None and self.trainer.training:
            self._count()
            self._pending.append(list(batch.keys))
            untaught = int((batch.labels[:, 1:] == IGNORE_INDEX).all(1).sum()) if batch.cut else 0
            self._cut_pending = _plus(self._cut_pending, (batch.cut, untaught))
        return batch

    def _count(self) -> None:
        """Settle what is pending, if the optimiser has stepped since the last look."""
        steps = self.trainer.global_step if self.trainer is not None else 0
        if self._pending and steps != self._optimizer_steps:
            self._digest = hashlib.sha256(json.dumps([self._digest, self._pending]).encode()).hexdigest()
            self._trained += len(self._pending)
            self._cut = _plus(self._cut, self._cut_pending)
            self._pending, self._cut_pending = [], (0, 0)
        self._optimizer_steps = steps

    def train_dataloader(self) -> TimedLoader:
        steps = self.max_steps * self._accumulate
        loader = train_loader(
            self.train,
            self.processor.prepare,
            self.processor.collate,
            self.config,
            self.seed,
            start_step=self.start_step,
            steps=steps,
        )
        self._loader = TimedLoader(loader, length=steps)
        return self._loader

    def teardown(self, stage: str) -> None:
        if self._loader is not None:  # Lightning ends the workers of DataLoaders alone
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def state_dict(self) -> dict[str, Any]:
        cut = {"cut_positions": self.cut_positions, "cut_answers": self.cut_answers}
        return {"step": self.step, "keys_digest": self.keys_digest, **cut, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were trained.

        Raises:
            ValueError: the data, the seed, the batch size or the accumulation are not those of the checkpoint.
        """
        here = self._identity()
        missing = {"step", "keys_digest", *here} - set(state_dict)
        if missing:
            raise ValueError(
                f"the checkpoint does not say its {', '.join(sorted(missing))}: it was written by another version of "
                "this program. Start a new run from its weights with init_from."
            )
        for name, value in here.items():
            if state_dict[name] != value:
                setting = _SETTINGS[name]
                raise ValueError(
                    f"the checkpoint was trained with {setting}={state_dict[name]}, this run has {value}: the order of "
                    f"samples would not go on where it stopped. Restore {setting}, or start a new run from its "
                    "weights with init_from."
                )
        # Checkpoints from before samples could be cut say nothing of it: nothing was.
        cut = (state_dict.get("cut_positions", 0), state_dict.get("cut_answers", 0))
        self._begin(state_dict["step"], state_dict["keys_digest"], cut)
        # Lightning looks for the position in the loader and would say that it is lost.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.train.fingerprint,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "accumulate_grad_batches": self._accumulate,
        }


def _plus(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


_SETTINGS = {
    "fingerprint": "data fingerprint",
    "seed": "seed",
    "batch_size": "data.batch_size",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
}
