"""Batches for Lightning, and where to go on: one integer in the checkpoint.

The position is the datamodule's and not the loader's: Lightning restores a loader's state only in the middle of an
epoch, and gives rank 0's to every rank.
"""

import warnings
from typing import Any

import lightning

from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.sources import Source
from deepstack_pl.data.stream import train_loader
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.training.throughput import TimedLoader


class DeepStackDataModule(lightning.LightningDataModule):
    """Training batches of ``train``, in an order that depends on (seed, step) alone.

    There is no validation loader: validation generates, which is evaluation's callback's own affair; ``val`` is kept
    for it.
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
        self.start_step = 0
        self._loader: TimedLoader | None = None

    @property
    def step(self) -> int:
        """Batches that have been trained on; what workers have fetched ahead does not count."""
        if self.trainer is None or not self.trainer.optimizers:
            return self.start_step
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def train_dataloader(self) -> TimedLoader:
        steps = self.max_steps * (self.trainer.accumulate_grad_batches if self.trainer else 1)
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
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were trained.

        Raises:
            ValueError: the data, the seed or the batch size are not those of the checkpoint.
        """
        for name, here in self._identity().items():
            there = state_dict[name]
            if there != here:
                raise ValueError(
                    f"the checkpoint was trained with {_SETTINGS[name]}={there}, this run has {here}: the order of "
                    f"samples would not go on where it stopped. Restore {_SETTINGS[name]}, or start a new run from its "
                    "weights with init_from."
                )
        self.start_step = state_dict["step"]
        # Lightning looks for the position in the loader and would say that it is lost.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.train.fingerprint, "seed": self.seed, "batch_size": self.config.batch_size}


_SETTINGS = {"fingerprint": "data fingerprint", "seed": "seed", "batch_size": "data.batch_size"}
