"""What writes down how a run goes: its loggers, and the Trainer's profiler."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from deepstack_pl.config.run import RunConfig
from deepstack_pl.training.loggers import unfailing

_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def loggers_of(run: RunConfig, folder: Path) -> list[Logger]:
    """One for each key of conf's logger, in the order given.

    Raises:
        ValueError: a key holds none, or one cannot be made.
    """
    found = []
    for name, values in run.logger.items():
        if not isinstance(values, dict) or "_target_" not in values:
            raise ValueError(
                f"logger.{name}={values}: every logger has a key of its own, such as logger.csv._target_=CLASS. Choose "
                "by logger=csv, or several by 'logger=[tensorboard,csv]'."
            )
        found.append(unfailing(name, instantiate({**values, "_partial_": True}), str(folder)))
    return found


def profiler_of(wanted: Any, folder: Path) -> Profiler | None:
    """The profiler that ``trainer.profiler`` names, with its report in ``folder``; one that is made already is kept.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted not in _PROFILERS:
        raise ValueError(f"trainer.profiler={wanted}: use {', '.join(_PROFILERS)}.")
    return _PROFILERS[wanted](dirpath=folder, filename="profile")
