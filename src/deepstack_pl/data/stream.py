"""Samples in an order that is a function of (fingerprint, seed, step) alone, whatever reads them.

An epoch is every sample once (a `mixture.Mixture` says otherwise), permuted, then put into *units* (`batching`): a
sample by itself, the samples of one micro-batch, or those of one packed row. Optimiser step t takes the next
``data.batch_size`` units; micro-batch a of process r is a fixed slice of them. So nothing depends on how many processes
or workers read, and where a run goes on is four numbers, a `Position`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch.utils.data import Sampler

from deepstack_pl.batch import MultimodalBatch, Record, Sample
from deepstack_pl.data.batching import FILL, Unit, Window, by_modality_and_length
from deepstack_pl.data.config import Batching, DataConfig, Remainder, Shuffle
from deepstack_pl.data.mixture import Mixture
from deepstack_pl.data.order import blocks, shuffled
from deepstack_pl.data.planning import PLANNED, Planner
from deepstack_pl.data.records import Source
from deepstack_pl.data.workers import TIMEOUT, Blank, PreparedSource, WatchedLoader, start_worker

ORDER_VERSION = 2  # of an epoch's order; a change of it is a change of every run's data


@dataclass(frozen=True, slots=True)
class Position:
    """Where the batch of optimiser step ``step`` begins: at unit ``unit`` of a window of an epoch.

    Batches that are not planned in windows have one window an epoch.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    unit: int = 0


class Stream:
    """The endless row of global batches."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        seed: int,
        *,
        lengths: Int[ndarray, " n"] | None = None,
        capacity: int | None = None,
    ) -> None:
        """``lengths`` are the samples' positions and ``capacity`` what of them is trained on at most; both are needed
        where `Batching` plans with them.

        Raises:
            ValueError: no samples, an epoch without a batch, or a sample that fits into no unit.
        """
        self.source, self.config, self.seed = source, config, seed
        self.samples = source.epoch_samples if isinstance(source, Mixture) else len(source)
        if not self.samples:
            raise ValueError(f"{source.describe()}: there is nothing to train on. Add samples.")
        self._planner: Planner | None = None
        if config.batching in PLANNED:
            assert lengths is not None, "this batching plans with lengths"
            assert capacity is not None
            self._planner = Planner(source, config, lengths, capacity)
        self._order: tuple[int, Int[ndarray, " n"]] = (-1, np.empty(0, np.int64))
        self._windows: dict[tuple[int, int], Window] = {}  # by epoch and number
        if config.remainder is Remainder.drop and not self._holds_batch((0, 0, 0)):
            raise ValueError(
                f"data.remainder=drop with data.batch_size={config.batch_size}: an epoch of {self.samples:,} samples "
                "has no full batch. Lower data.batch_size, or say data.remainder=pad."
            )

    def batches(self, start: Position) -> Iterator[tuple[tuple[Unit, ...], Position]]:
        """Each global batch from ``start`` on, exactly ``data.batch_size`` units, and the position after it.

        Raises:
            ValueError: ``start`` is beyond its epoch.
        """
        position, size = start, self.config.batch_size
        if start.window >= self._window_count or start.unit >= len(self._window_of(start.epoch, start.window)):
            raise ValueError(f"{start}: no batch begins there. It is of other data, or of other settings.")
        while True:
            begin = (position.epoch, position.window)
            self._windows = {at: window for at, window in self._windows.items() if at >= begin}
            taken = self._units(position, size)
            after = self._after(position, size) or (position.epoch, self._window_count, 0)
            while not self._holds_batch(after):  # nor may a whole epoch, where remainders are dropped
                after = (after[0] + 1, 0, 0)
            position = Position(position.step + 1, *after)
            yield taken + ((),) * (size - len(taken)), position

    def epoch_batches(self, epoch: int) -> Iterator[tuple[Unit, ...]]:
        """The global batches of one epoch."""
        for units, after in self.batches(Position(0, epoch)):
            yield units
            if after.epoch != epoch:
                return

    def position(self, step: int) -> Position:
        """Where step ``step`` begins: at once, except where batches are planned in windows, which are then planned up
        to it.
        """
        if self._planner:
            begins = (after for _, after in self.batches(Position()))
            return next(islice(begins, step - 1, None)) if step else Position()
        epoch, batch = divmod(step, self.batches_per_epoch)
        return Position(step, epoch, 0, batch * self.config.batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """Only where batches are not planned in windows: there epochs differ."""
        assert self._planner is None
        full, rest = divmod(self.samples, self.config.batch_size)
        return full + (rest > 0 and self.config.remainder is Remainder.pad)

    def steps(self, epochs: float) -> int:
        """Optimiser steps in so many epochs, rounded down, 1 at least: full batches of samples, or, where batches are
        planned in windows, as many as there are.
        """
        exact = Fraction(str(epochs))
        if self._planner is None:
            return max(1, int(exact * self.samples / self.config.batch_size))
        counts = [sum(1 for _ in self.epoch_batches(epoch)) for epoch in range(ceil(epochs))]
        return max(1, int(sum(counts) - (len(counts) - exact) * counts[-1]))

    def describe(self) -> str:
        """One line for the log: what an epoch is."""
        size, what = self.config.batch_size, f"an epoch is {self.samples:,} samples"
        if self._planner:
            unit = "packed rows" if self.config.batching is Batching.packed else "micro-batches"
            return f"{what}, in steps of {size} {unit}; the last step of an epoch {self._last()}"
        rest = self.samples % size
        last = f"; the last one {self._last(rest)}" if rest else ""
        return f"{what} in {self.batches_per_epoch:,} batches of {size}{last}"

    def _last(self, rest: int | None = None) -> str:
        if self.config.remainder is Remainder.drop:
            return "is dropped where it is not full" if rest is None else f"would hold {rest}, and these are dropped"
        return "is filled up with empty rows" if rest is None else f"holds {rest} and is filled up with empty rows"

    @property
    def _window_count(self) -> int:
        return -(-self.samples // self.config.window) if self._planner else 1

    def _epoch_order(self, epoch: int) -> Int[ndarray, " n"]:
        if self._order[0] != epoch:
            source, config = self.source, self.config
            text = f"{ORDER_VERSION} {source.fingerprint} {self.seed} {epoch} {self.samples}"
            numbers = source.numbers(epoch, self.seed) if isinstance(source, Mixture) else np.arange(len(source))
            if config.shuffle is Shuffle.full:
                permutation = shuffled(self.samples, text)
            else:
                permutation = blocks(self.samples, config.block, config.window, text)
            order = numbers[permutation]
            if config.batching is Batching.modality_length:
                if config.remainder is Remainder.drop:  # before they are sorted, or always the shortest were dropped
                    order = order[: len(order) // config.batch_size * config.batch_size]
                reach = None if config.shuffle is Shuffle.full else max(1, config.window // config.batch_size)
                order = by_modality_and_length(order, source.columns, config.batch_size, text, reach)
            self._order = (epoch, order)
        return self._order[1]

    def _window_of(self, epoch: int, number: int) -> Window:
        if (epoch, number) not in self._windows:
            window: Window = self._epoch_order(epoch)
            if self._planner:
                part = window[number * self.config.window : (number + 1) * self.config.window]
                window = self._planner.units(
                    part, f"{ORDER_VERSION} {self.source.fingerprint} {self.seed} {epoch} {number}"
                )
            self._windows[epoch, number] = window
        return self._windows[epoch, number]

    def _units(self, start: Position, count: int) -> tuple[Unit, ...]:
        """At most ``count`` units from ``start`` on, those of its epoch alone."""
        taken: list[Unit] = []
        window, unit = start.window, start.unit
        while len(taken) < count and window < self._window_count:
            part = self._window_of(start.epoch, window)[unit : unit + count - len(taken)]
            taken += [(int(each),) for each in part] if isinstance(part, ndarray) else part
            window, unit = window + 1, 0
        return tuple(taken)

    def _after(self, start: Position, count: int) -> tuple[int, int, int] | None:
        """Epoch, window and unit ``count`` units after ``start``; None if the epoch has fewer."""
        window, unit = start.window, start.unit + count
        while window < self._window_count:
            size = len(self._window_of(start.epoch, window))
            if unit < size or (unit == size and window == self._window_count - 1):
                return start.epoch, window, unit
            window, unit = window + 1, unit - size
        return None

    def _holds_batch(self, at: tuple[int, int, int]) -> bool:
        """Whether a batch begins there: with a full one, or with any unit at all where the last is filled up."""
        least = self.config.batch_size if self.config.remainder is Remainder.drop else 1
        return self._after(Position(0, *at), least) is not None


def micro_batches(units: Sequence[Unit], rank: int, world: int, size: int) -> list[tuple[Unit, ...]]:
    """The micro-batches of process ``rank`` of ``world`` in one global batch, ``size`` units each."""
    assert not len(units) % (world * size)
    return [tuple(units[start : start + size]) for start in range(rank * size, len(units), world * size)]


class MicroBatchSampler(Sampler[list[Any]]):
    """The micro-batches of one process in ``steps`` optimiser steps from ``start`` on, as sample numbers.

    Attributes:
        handed: those that were handed out; who receives their batches takes them away, oldest first.
    """

    def __init__(
        self, stream: Stream, start: Position, *, steps: int, rank: int = 0, world: int = 1, size: int | None = None
    ) -> None:
        self.stream, self.start, self.steps = stream, start, steps
        self.rank, self.world = rank, world
        self.size = size or stream.config.micro_batch(world)
        self.handed: deque[list[Any]] = deque()
        self._begins = {start.step: start}

    def __len__(self) -> int:
        return self.steps * (self.stream.config.batch_size // (self.size * self.world))

    def __iter__(self) -> Iterator[list[Any]]:
        """Lists of sample numbers, `FILL` for rows that fill a batch; of tuples of them where rows are packed."""
        packed = self.stream.config.batching is Batching.packed
        self.handed.clear()
        for units, after in islice(self.stream.batches(self.start), self.steps):
            self._begins[after.step] = after
            for batch in micro_batches(units, self.rank, self.world, self.size):
                filled = [unit or (FILL,) for unit in batch]
                self.handed.append(list(filled) if packed else [number for unit in filled for number in unit])
                yield self.handed[-1]

    def position(self, step: int) -> Position:
        """Where ``step`` begins, which must have been reached; earlier steps are forgotten."""
        self._begins = {number: begins for number, begins in self._begins.items() if number >= step}
        assert step in self._begins, f"step {step} was not read: who iterated this sampler twice?"
        return self._begins[step]


def train_loader(
    source: Source,
    prepare: Callable[[Record], Sample],
    blank: Blank,
    collate: Callable[[list[Any]], MultimodalBatch],
    sampler: MicroBatchSampler,
    config: DataConfig,
    seed: int,
    timeout: float = TIMEOUT,
) -> WatchedLoader:
    """The micro-batches of ``sampler``; read once, from front to back.

    ``timeout``: seconds without a batch after which a worker is taken for hung.

    The loader has a generator of its own: drawing the workers' seeds from the global one would change every number
    drawn after it, so that a run that was interrupted would differ from one that was not.
    """
    return WatchedLoader(
        PreparedSource(source, prepare, blank),
        batch_sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        timeout=timeout if config.workers else 0,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
    )
