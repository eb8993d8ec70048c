"""Checkpoints to go on from: the newest one, always whole. Lightning's ModelCheckpoint, and what it lacks."""

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class RunCheckpoint(ModelCheckpoint):
    """``last.ckpt`` every ``every_steps`` steps and at the end, wherever the end is.

    Two things differ from ModelCheckpoint: a run that ends between two saves (Ctrl-C, an odd number of steps) is saved
    too; and an exception is saved beside, as ``exception.ckpt``, because it may have come in the middle of an update.
    """

    def __init__(self, dirpath: str | Path, every_steps: int = 100) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: save every 1 or more steps.")
        super().__init__(
            dirpath=str(dirpath),
            every_n_train_steps=every_steps,
            save_last=True,
            save_top_k=0,  # the newest alone
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self._should_skip_saving_checkpoint(trainer) or not trainer.optimizers:
            return
        if trainer.world_size > 1:
            rank_zero_warn(
                "No checkpoint of this exception: saving takes all processes, and the others may not answer."
            )
            return
        path = Path(str(self.dirpath)) / f"exception{self.FILE_EXTENSION}"
        trainer.save_checkpoint(path)
        rank_zero_info(f"{type(exception).__name__}: saved as it stood at step {trainer.global_step} in {path}")
