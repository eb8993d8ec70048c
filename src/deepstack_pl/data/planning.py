"""Units of several samples, planned window by window from the samples' lengths."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.data.batching import Unit, bins
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.order import shuffled
from deepstack_pl.data.packing import packs
from deepstack_pl.data.records import Source

PLANNED = (Batching.token_budget, Batching.packed)  # the batchings that are planned so


class Planner:
    """Puts the samples of a window into micro-batches or packed rows.

    Attributes:
        lengths: of every sample as it is trained on: cut at the capacity, and 1 where it is refused.
    """

    def __init__(self, source: Source, config: DataConfig, lengths: Int[ndarray, " n"], capacity: int) -> None:
        """As in `stream.Stream`.

        Raises:
            ValueError: a sample is longer than ``data.token_budget``.
        """
        assert config.batching in PLANNED
        assert lengths.shape == (len(source),), "these are the lengths of other samples"
        self.config, self.capacity = config, capacity
        self.lengths = fitting(lengths, capacity)
        longest, budget = int(self.lengths.argmax()), config.token_budget
        if config.batching is Batching.token_budget and self.lengths[longest] > budget:
            raise ValueError(
                f"{source.key(longest)} has {self.lengths[longest]:,} positions, more than data.token_budget={budget}: "
                "it fits into no micro-batch. Raise data.token_budget to that or more, or lower llm.max_length."
            )

    def units(self, numbers: Int[ndarray, " w"], text: str) -> list[Unit]:
        """The window of these samples, its units in the order that ``text`` names."""
        lengths = self.lengths[numbers]
        if self.config.batching is Batching.token_budget:
            units = bins(numbers, lengths, self.config.token_budget)
        else:
            units = packs(numbers, lengths, self.capacity)
        return [units[place] for place in shuffled(len(units), text)]


def fitting(lengths: Int[ndarray, " n"], capacity: int) -> Int[ndarray, " n"]:
    """The positions of samples as they are trained on; a refused one (0) is a row of one position."""
    return np.clip(lengths, 1, capacity)
