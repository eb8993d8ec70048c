"""Which samples share a unit or a batch of the stream: like lengths together."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.data.columns import Columns
from deepstack_pl.data.order import shuffled, shuffled_within

Unit = tuple[int, ...]  # sample numbers; () fills a batch and counts nothing
FILL = -1  # stands for the sample of such a unit: a row that counts nothing
Window = Sequence[Unit] | ndarray  # units, or as an array samples that are units by themselves


def by_modality_and_length(
    order: Int[ndarray, " n"], columns: Columns, batch: int, text: str, reach: int | None = None
) -> Int[ndarray, " n"]:
    """LLaVA's ``group_by_modality_length``, on the global batch.

    Samples with and without images are put into batches of their own, in the order given, each batch from its longest
    text to its shortest, and the full batches change places: any two, or only those within the same ``reach`` batches.
    What fills no batch of its kind comes last, together.
    """
    image, length = columns.images[order] > 0, columns.text[order]
    full, rest = [], []
    for places in (np.flatnonzero(image), np.flatnonzero(~image)):
        whole = len(places) // batch * batch
        full.append(places[:whole].reshape(-1, batch))
        rest.append(places[whole:][np.argsort(-length[places[whole:]], kind="stable")])
    batches = np.concatenate(full)
    if reach is None:
        batches = batches[shuffled(len(batches), f"{text} batches")]
    else:
        batches = batches[np.argsort(batches[:, 0])]
        batches = batches[shuffled_within(len(batches), reach, f"{text} batches")]
    longest_first = np.argsort(-length[batches], axis=1, kind="stable")
    return order[np.concatenate([np.take_along_axis(batches, longest_first, axis=1).reshape(-1), *rest])]


def bins(numbers: Int[ndarray, " w"], lengths: Int[ndarray, " w"], budget: int) -> list[Unit]:
    """Like lengths together, as many as fit: count times longest is at most ``budget``."""
    longest_first = np.argsort(-lengths, kind="stable")
    units: list[Unit] = []
    start = 0
    while start < len(numbers):
        count = max(1, budget // int(lengths[longest_first[start]]))
        units.append(tuple(numbers[longest_first[start : start + count]].tolist()))
        start += count
    return units
