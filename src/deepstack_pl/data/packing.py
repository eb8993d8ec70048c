"""The packing plan: which samples fill one row together; and all of a micro-batch in one row."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.batch import MultimodalBatch, Sample
from deepstack_pl.data.batching import Unit


def packs(numbers: Int[ndarray, " w"], lengths: Int[ndarray, " w"], capacity: int) -> list[Unit]:
    """Rows of at most ``capacity`` positions, best fit, longest first; no sample is split.

    ``lengths`` are from 1 to ``capacity``. Best fit decreasing needs at most 11/9 of the fewest rows, plus 4 (Johnson,
    1973).
    """
    units: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of a row, and which row, least first
    for place in np.argsort(-lengths, kind="stable"):
        length = int(lengths[place])
        found = bisect_left(room, (length, -1))
        if found < len(room):
            left, row = room.pop(found)
        else:
            left, row = capacity, len(units)
            units.append([])
        units[row].append(int(numbers[place]))
        if left > length:
            insort(room, (left - length, row))
    return [tuple(unit) for unit in units]


def in_one_row(
    collate: Callable[[list[list[Sample]]], MultimodalBatch], rows: Sequence[Sample | Sequence[Sample]]
) -> MultimodalBatch:
    """``collate``'s batch of all samples of ``rows`` side by side in a single row, where nothing is padded."""
    return collate([[sample for row in rows for sample in ([row] if isinstance(row, Sample) else row)]])
