"""The look before every update: a loss or a gradient that is no number never reaches a weight, on any process."""

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from deepstack_pl.processes import from_all
from deepstack_pl.training.config import NonFinite, OptimConfig

_NAMED = 8  # samples in a message


class NotFinite(ValueError):
    """A step came out infinite or not a number; no weight was changed."""


class FiniteGuard:
    """Stops the run, or leaves the step out, as ``optim.nonfinite`` says.

    Attributes:
        skipped: steps that were left out, with the keys of their samples.
    """

    def __init__(self, optim: OptimConfig) -> None:
        self.optim = optim
        self.skipped: list[tuple[int, list[str]]] = []
        self._keys: list[str] = []

    def add(self, keys: Sequence[str]) -> None:
        """A micro-batch of the step in progress, of this process."""
        self._keys += [key for key in keys if key]

    def look(self, loss: Tensor, norm: Tensor, trained: Iterable[nn.Parameter], step: int) -> list[str]:
        """``loss`` and ``norm`` are of all processes, and so is what follows. A skipped step has no gradients: AdamW
        then leaves weights and states alone, and the step counts, so that the order of samples goes on.

        Returns:
            The keys of this process's samples in a step that is left out; nothing where all is well.

        Raises:
            NotFinite: a step must stop the run.
        """
        keys, self._keys = self._keys, []
        if bool(torch.isfinite(torch.stack([loss.detach().float(), norm.detach().float()])).all()):
            return []
        every = [key for each in from_all(keys) for key in each]
        more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
        told = (
            f"step {step + 1}: the loss is {float(loss)} and the norm of the gradients {float(norm)}. No weight was "
            f"changed. Its samples: {', '.join(every[:_NAMED])}{more}."
        )
        if self.optim.nonfinite is NonFinite.stop:
            raise NotFinite(
                f"{told} Lower the learning rates, look at these samples (deepstack shards show), or say "
                "optim.nonfinite=skip to leave such steps out."
            )
        if len(self.skipped) >= self.optim.max_skipped:
            raise NotFinite(
                f"{told} {len(self.skipped)} steps were left out before, as many as optim.max_skipped="
                f"{self.optim.max_skipped} allows. Lower the learning rates."
            )
        self.skipped.append((step, every))
        rank_zero_warn(f"{told} The step is left out.")
        for parameter in trained:
            parameter.grad = None
        return keys
