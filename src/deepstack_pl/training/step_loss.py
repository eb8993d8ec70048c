"""The loss of one optimiser step: the mean over all its supervised tokens, however they are spread.

A mean per micro-batch would weigh a token by how many others happen to share its micro-batch, so that rows which fill a
batch, and the size of a forward, would change the gradient.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch
from deepstack_pl.processes import from_all, several


class StepLoss:
    """Sums over the micro-batches of one optimiser step of this process; `begin` forgets them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._loss: Tensor | None = None
        self._tokens: Tensor | None = None
        self._by_source: dict[str, tuple[float, int]] = {}  # loss and tokens

    def add(self, losses: Float[Tensor, " l"], batch: MultimodalBatch) -> Tensor:
        """The sum of the losses of a micro-batch, given that of each learned token."""
        total, tokens = losses.sum(), (batch.targets != IGNORE_INDEX).sum()
        self._loss = total.detach() if self._loss is None else self._loss + total.detach()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        return total

    def add_sources(self, losses: Float[Tensor, " l"], batch: MultimodalBatch) -> None:
        """Keep the losses of this micro-batch by source."""
        owners, learned = batch.sample_ids().flatten()[batch.learned_at], batch.targets != IGNORE_INDEX
        for source in sorted({name for name in batch.sources if name}):
            its = [place for place, name in enumerate(batch.sources) if name == source]
            here = torch.isin(owners, torch.tensor(its, device=owners.device)) & learned
            if bool(here.any()):
                before, tokens = self._by_source.get(source, (0.0, 0))
                self._by_source[source] = before + float(losses[here].sum()), tokens + int(here.sum())

    def totals(self) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of tokens of the step, over all processes; all must ask."""
        assert self._loss is not None
        assert self._tokens is not None
        both = torch.stack([self._loss.float(), self._tokens.float()])
        if several():
            dist.all_reduce(both)
        return both[0], both[1]

    def by_source(self) -> dict[str, float]:
        """The mean loss of each source that the step holds, over all processes; all must ask."""
        every = from_all(self._by_source)
        found = {}
        for source in sorted({source for each in every for source in each}):
            losses, tokens = zip(*(each[source] for each in every if source in each), strict=True)
            found[source] = sum(losses) / sum(tokens)
        return found
