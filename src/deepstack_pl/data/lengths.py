"""The positions of every sample, measured once and kept: what batches are planned with."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.batch import Refused
from deepstack_pl.data.progress import bar
from deepstack_pl.data.records import Outline, Source
from deepstack_pl.data.workers import start_worker

_AT_ONCE = 2048  # samples that a process is handed together


def measure_lengths(
    source: Source, count: Callable[[Outline], int], digest: str, cache: Path, processes: int = 1
) -> Int[ndarray, " n"]:
    """The positions of each sample before it is cut; 0 for one that is refused, which becomes a row of its own.

    They are kept under ``cache``, by the fingerprint of ``source`` and ``digest``, which names all that ``count``
    depends on. ``count`` and ``source`` travel to the processes.

    Raises:
        ValueError: what is kept there cannot be read.
    """
    name = hashlib.sha256(f"{source.fingerprint} {digest}".encode()).hexdigest()[:20]
    file = cache / f"lengths-{name}.npy"
    if file.is_file():
        return _read(file, len(source))
    lengths = np.fromiter(_measured(source, count, processes), np.int64, len(source))
    cache.mkdir(parents=True, exist_ok=True)
    partial_file = cache / f".{file.name}.{uuid4().hex}"
    with partial_file.open("wb") as out:
        np.save(out, lengths, allow_pickle=False)
    os.replace(partial_file, file)
    return lengths


def _read(file: Path, n: int) -> Int[ndarray, " n"]:
    try:
        lengths = np.load(file, allow_pickle=False)
        if lengths.shape != (n,) or lengths.dtype != np.int64:
            raise ValueError(f"{lengths.dtype} of shape {lengths.shape}, not int64 of ({n},)")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{file}: not the lengths of {n:,} samples ({error}). Delete it: they are measured anew."
        ) from error
    return lengths


def _measured(source: Source, count: Callable[[Outline], int], processes: int) -> Iterator[int]:
    starts = range(0, len(source), _AT_ONCE)
    work = partial(_some, source, count)
    with bar("Measuring the samples' lengths", len(source)) as advance:
        if processes == 1 or len(starts) <= 1:
            for part in map(work, starts):
                advance(len(part))
                yield from part
            return
        # Spawned, since the tokenizer's threads would not outlive a fork.
        with ProcessPoolExecutor(min(processes, len(starts)), get_context("spawn"), start_worker) as pool:
            for part in pool.map(work, starts):
                advance(len(part))
                yield from part


def _some(source: Source, count: Callable[[Outline], int], start: int) -> list[int]:
    return [_one(source, count, number) for number in range(start, min(start + _AT_ONCE, len(source)))]


def _one(source: Source, count: Callable[[Outline], int], number: int) -> int:
    try:
        return count(source.outline(number))
    except Refused:
        return 0
