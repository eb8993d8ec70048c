"""What was trained on, in TensorBoard."""

from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.training.datamodule import DeepStackDataModule


class DataCounts(lightning.Callback):
    """Logs what was trained on so far, of all processes: samples by source, refused by reason, cut."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        # Lightning sets these in its connectors.
        every, data = trainer.log_every_n_steps, trainer.datamodule  # type: ignore[attr-defined]
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % every:
            return
        assert isinstance(data, DeepStackDataModule)
        tally = data.tally()
        values = {"data/samples": tally.samples, "data/refused": tally.refused.total()}
        values |= {"data/cut_samples": tally.cut_samples, "data/cut_positions": tally.cut_positions}
        values |= {f"data/refused/{reason}": count for reason, count in tally.refused.items()}
        if len(tally.sources) > 1:
            values |= {f"data/samples/{source}": count for source, count in tally.sources.items()}
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)
