"""``deepstack shards plan``: the batches of an epoch, under each batching, before anything is trained."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Batching, DataConfig, StreamKind

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray
    from rich.table import Table

    from deepstack_pl.data.records import Source
    from deepstack_pl.data.stream import Stream

HELP = "the batches of an epoch, planned and counted: what is in them, and how much of them is padding"
EXAMPLE = "deepstack shards plan data=llava665k data.root=DIR llm=vicuna_7b model=deepstack_l"
OWN: dict[str, str] = {}
_PIPE = 100  # columns where there is no terminal


@dataclass(frozen=True, slots=True)
class Waste:
    """What one batching makes of an epoch on one process. Rows that only fill the last step are not in it, or the last
    step of a small set would hide what the others are like.
    """

    steps: int
    units: int
    forwards: int
    positions: int  # padding included
    used: int

    @property
    def padding(self) -> float:
        """The share of positions that hold nothing."""
        return 1 - self.used / self.positions


def run(run: RunConfig, own: dict[str, str]) -> int:
    """Plan; 0.

    Raises:
        ValueError: the data or the processor is not at hand, or the data have no index.
    """
    if run.data.stream is StreamKind.webdataset:
        raise ValueError(
            "data.stream=webdataset: its batches are whatever comes, and nothing of them is known before. Plan with "
            "data.stream=indexed."
        )

    from rich.console import Console

    from deepstack_pl.cli.assemble import make_processor, settle
    from deepstack_pl.cli.checks import check_vocabulary
    from deepstack_pl.cli.layout import lengths_of
    from deepstack_pl.data.sources import open_sources

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_PIPE)
    for note in settle(run):
        console.print(note, markup=False, soft_wrap=True)
    processor = make_processor(run)
    check_vocabulary(run, processor)
    train, _ = open_sources(run.data)
    lengths = lengths_of(train, processor, replace(run, data=under(run.data, Batching.packed)))
    assert lengths is not None
    for line in facts(train, lengths, processor.max_length, run):
        console.print(line, markup=False, soft_wrap=True)
    console.print(sources_table(train, lengths, processor.max_length, run))
    table, notes = batchings_table(train, lengths, processor.max_length, run)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    return 0


def under(config: DataConfig, batching: Batching) -> DataConfig:
    """``config`` with another batching; micro-batches planned by budget are units by themselves."""
    size = None if batching is Batching.token_budget else config.micro_batch_size
    return replace(config, batching=batching, micro_batch_size=size)


def facts(train: "Source", lengths: "Int[ndarray, ' n']", capacity: int, run: RunConfig) -> Iterator[str]:
    """Lines on what an epoch is, and what of it cannot be trained on or is cut."""
    from deepstack_pl.data.stream import Stream

    yield train.describe()
    yield Stream(train, run.data, run.seed, lengths=lengths, capacity=capacity).describe()
    refused, cut = int((lengths == 0).sum()), lengths[lengths > capacity]
    if refused:
        yield f"{refused:,} of {len(lengths):,} samples will be refused: deepstack shards show says why."
    if len(cut):
        yield (
            f"{len(cut):,} of {len(lengths):,} samples ({len(cut) / len(lengths):.2%}) are longer than "
            f"llm.max_length={capacity}: {int((cut - capacity).sum()):,} positions will be cut "
            f"(llm.too_long={run.llm.too_long.name}); the longest has {int(cut.max()):,}."
        )


def sources_table(train: "Source", lengths: "Int[ndarray, ' n']", capacity: int, run: RunConfig) -> "Table":
    """What the first epoch holds of each part of the corpus."""
    import numpy as np
    from rich.table import Table

    from deepstack_pl.data.mixture import Mixture
    from deepstack_pl.data.planning import fitting

    numbers = train.numbers(0, run.seed) if isinstance(train, Mixture) else np.arange(len(train))
    columns, positions = train.columns.take(numbers), fitting(lengths, capacity)[numbers]
    table = Table(title=f"An epoch of {run.data.name}: {len(numbers):,} samples, {int(positions.sum()):,} positions")
    for name in ("source", "samples", "share", "with images", "images", "positions each"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for place, source in enumerate(columns.sources):
        mine = columns.source == place
        if mine.any():
            table.add_row(
                source or "(unnamed)",
                f"{int(mine.sum()):,}",
                f"{mine.mean():.1%}",
                f"{(columns.images[mine] > 0).mean():.1%}",
                f"{int(columns.images[mine].sum()):,}",
                f"{positions[mine].mean():,.0f}",
            )
    return table


def batchings_table(
    train: "Source", lengths: "Int[ndarray, ' n']", capacity: int, run: RunConfig
) -> tuple["Table", list[str]]:
    """What each batching makes of the first epoch, and why one of them cannot."""
    from rich.table import Table

    from deepstack_pl.data.stream import Stream

    caption = (
        "On one process. A row is padded to the longest of its forward; rows that fill the last step do not count."
    )
    table = Table(title=f"Batchings of these samples; this run's is {run.data.batching.name}", caption=caption)
    for name in ("data.batching", "steps", "units", "units a forward", "positions a forward", "padding"):
        table.add_column(name, justify="left" if name == "data.batching" else "right")
    notes = []
    for batching in Batching:
        config = under(run.data, batching)
        try:
            stream = Stream(train, config, run.seed, lengths=lengths, capacity=capacity)
        except ValueError as error:
            table.add_row(batching.name, *["-"] * 5)
            notes.append(f"data.batching={batching.name}: {error}")
            continue
        found = waste(stream, lengths, capacity)
        table.add_row(
            batching.name,
            f"{found.steps:,}",
            f"{found.units:,}",
            f"{config.micro_batch():,}",
            f"{found.positions / found.forwards:,.0f}",
            f"{found.padding:.2%}",
        )
    return table, notes


def waste(stream: "Stream", lengths: "Int[ndarray, ' n']", capacity: int) -> Waste:
    """Count the first epoch's positions: every row of a forward is as long as its longest."""
    from deepstack_pl.data.planning import fitting
    from deepstack_pl.data.stream import micro_batches

    each, size = fitting(lengths, capacity).tolist(), stream.config.micro_batch()
    packed = stream.config.batching is Batching.packed
    steps = units = forwards = positions = used = 0
    for batch in stream.epoch_batches(0):
        steps += 1
        for forward in micro_batches(batch, 0, 1, size):
            held = [[each[number] for number in unit] for unit in forward if unit]
            rows = [sum(unit) for unit in held] if packed else [length for unit in held for length in unit]
            units += len(held)
            forwards += bool(rows)
            positions += len(rows) * max(rows, default=0)
            used += sum(rows)
    return Waste(steps, units, forwards, positions, used)
