"""Samples in an order that is a function of (seed, step) alone, whatever reads them.

Sample number ``step * batch_size + i`` of the endless row of epochs, each a permutation of its own, is row ``i`` of
that step's batch. Batches straddle epochs, so that within an epoch no sample is lost or doubled; going on after an
interruption is one number.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset, Sampler

from deepstack_pl.batch import MultimodalBatch, Record, Sample
from deepstack_pl.data.config import DataConfig

ORDER_VERSION = 1  # of `order`; a change of what it returns is a change of every run's data


class Records(Protocol):
    """What is read from: see `sources`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def order(n: int, seed: int, epoch: int) -> Int64[ndarray, " n"]:
    """The permutation of ``n`` samples in ``epoch``: sorted raw Philox output, which no numpy release may change."""
    key = hashlib.sha256(f"{ORDER_VERSION} {seed} {epoch} {n}".encode()).digest()
    draws = np.random.Philox(key=np.frombuffer(key[:16], "<u8")).random_raw(n)
    return np.argsort(draws, kind="stable")


class StepSampler(Sampler[list[int]]):
    """The batches of steps ``start_step`` to ``steps - 1``, as lists of sample numbers."""

    def __init__(self, n: int, batch_size: int, seed: int, start_step: int, steps: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"{n} samples in batches of {batch_size}: both must be at least 1.")
        if start_step < 0:
            raise ValueError(f"start_step={start_step}: steps count from 0.")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start_step, self.steps = start_step, steps

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.steps):
            batch = []
            for number in range(step * self.batch_size, (step + 1) * self.batch_size):
                if number // self.n != epoch:
                    epoch = number // self.n
                    permutation = order(self.n, self.seed, epoch)
                batch.append(int(permutation[number % self.n]))
            yield batch


class PreparedSource(Dataset[Sample]):
    """A source's records as samples, made where they are read: in the worker."""

    def __init__(self, source: Records, prepare: Callable[[Record], Sample]) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.prepare(self.source[index])


def train_loader(
    source: Records,
    prepare: Callable[[Record], Sample],
    collate: Callable[[list[Sample]], MultimodalBatch],
    config: DataConfig,
    seed: int,
    start_step: int,
    steps: int,
) -> DataLoader[Sample]:
    """Batches of steps ``start_step`` to ``steps - 1``; read once, from front to back.

    The loader has a generator of its own: drawing the workers' seeds from the global one would change every number
    drawn after it, so that a run that was interrupted would differ from one that was not.
    """
    return DataLoader(
        PreparedSource(source, prepare),
        batch_sampler=StepSampler(len(source), config.batch_size, seed, start_step, steps),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=start_worker,
        collate_fn=collate,
    )


def start_worker(_worker: int) -> None:
    """Ctrl-C is the main process's to answer, and workers take one core each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
