"""TensorBoard's HParams tab: what a run was, beside what it came to, so that the runs of a sweep compare there."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

_SHOWN = ("model.", "stage.", "optim.", "seed", "data.batch_size", "trainer.max_steps")
_NAMES = ("llm.name", "vision.name", "projector.name", "data.name")


def log_hparams(loggers: Iterable[Logger], values: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Write ``values``, a run's by dotted name, as one session whose ``metrics`` are scalars logged already.

    torch's `add_hparams` would write into a folder of its own, and Lightning's method a metric of -1 at step 0.
    """
    shown = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in values.items()
        if value is not None and (name.startswith(_SHOWN) or name in _NAMES)
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            writer = logger.experiment.file_writer
            for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
                writer.add_summary(summary)
