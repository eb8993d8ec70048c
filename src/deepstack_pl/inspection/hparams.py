"""TensorBoard's HParams tab: what a run was, beside what it came to, so that the runs of a sweep compare there."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

_SHOWN = ("model.", "stage.", "optim.", "seed", "data.batch_size", "trainer.max_steps")
_NAMES = ("llm.name", "vision.name", "projector.name", "data.name")


@runtime_checkable
class _Guarded(Protocol):
    """A logger whose failures stop nothing: it is asked to do what it could not see."""

    def attempt(self, action: Callable[[], Any]) -> Any: ...


def log_hparams(loggers: Iterable[Logger], values: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Write ``values``, a run's by dotted name, as one session whose ``metrics`` are scalars logged already.

    torch's `add_hparams` would write into a folder of its own, and Lightning's method a metric of -1 at step 0.
    """
    shown = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in values.items()
        if value is not None and (name.startswith(_SHOWN) or name in _NAMES)
    }
    summaries = hparams(shown, dict.fromkeys(metrics, 0.0))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            add = partial(_add, logger, summaries)
            if isinstance(logger, _Guarded):  # the file below the writer is out of its sight
                logger.attempt(add)
            else:
                add()


def _add(logger: TensorBoardLogger, summaries: Iterable[Any]) -> None:
    for summary in summaries:
        logger.experiment.file_writer.add_summary(summary)
