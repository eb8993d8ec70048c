"""The packing plan: which samples fill one row together."""

from bisect import bisect_left, insort

import numpy as np
from jaxtyping import Int
from numpy import ndarray

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
