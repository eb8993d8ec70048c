"""Loggers that never stop training: one that raises is named once, and then left alone. Process 0 alone logs."""

from collections.abc import Callable
from functools import partial
from types import new_class
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn

from deepstack_pl.processes import rank


def unfailing(name: str, make: partial[Any], folder: str) -> Logger:
    """The logger of a class of Lightning's that ``make`` would make, to write into ``folder``; called ``name``.

    Raises:
        ValueError: it is no logger's class, does not take an argument, or what it needs is not installed.
    """
    kind = make.func
    if not (isinstance(kind, type) and issubclass(kind, Logger)):
        raise ValueError(f"logger.{name}: {kind} is no class of loggers. Name one in logger.{name}._target_.")
    safe = new_class(kind.__name__, (_Unfailing, kind), exec_body=lambda space: space.update(label=name))
    try:
        return safe(*make.args, **{**make.keywords, "save_dir": folder})
    except ModuleNotFoundError as error:
        raise ValueError(f"logger={name}: {error}. Install what is missing, or take another logger=.") from error
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"logger.{name}: {error}") from error


class _Unfailing(Logger if TYPE_CHECKING else object):
    """Mixed into a logger's class: all that Lightning and our callbacks ask of one."""

    label = ""
    failed = False

    @property
    def experiment(self) -> Any:
        """What the logger writes with; what is written so is caught as well."""
        found = self.attempt(lambda: super(_Unfailing, self).experiment)  # type: ignore[misc]
        return DummyLogger().experiment if found is None else _Writer(found, self.attempt)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_hyperparams, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_graph, *args, **kwargs)

    def save(self) -> None:
        self.attempt(super().save)

    def after_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().after_save_checkpoint, *args, **kwargs)

    def finalize(self, status: str) -> None:
        self.attempt(super().finalize, status)

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``action`` gives; None if it raises, which is said once, or if something did before."""
        if self.failed or rank():
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.failed = True
            rank_zero_warn(
                f"logger {self.label} failed and is left alone from here on; training goes on without it. "
                f"{type(error).__name__}: {error}"
            )
            return None


class _Writer:
    """``experiment``, as which it serves; its functions are called by ``call``."""

    def __init__(self, experiment: Any, call: Callable[..., Any]) -> None:
        self._experiment, self._call = experiment, call

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._experiment, name)
        return partial(self._call, found) if callable(found) else found
