"""`deepstack shards plan`: what it counts is what the stream would read, under every batching, trainable yet or not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import run_of

from deepstack_pl.cli import shards_plan
from deepstack_pl.cli.assemble import make_processor
from deepstack_pl.cli.layout import lengths_of
from deepstack_pl.cli.shards_plan import batchings_table, facts, sources_table, under, waste
from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.sources import open_sources
from deepstack_pl.data.stream import PreparedSource, Stream

PAGES = ("data.fine_print.train_pages=6", "data.fine_print.val_pages=2", "data.batch_size=4")
COUNT, CAPACITY = 40, 30
LENGTHS = np.random.default_rng(0).integers(0, 40, COUNT)  # some refused, some cut


class Talks:
    """Samples of three sources, in the order of their numbers; the last has images only in part."""

    fingerprint = "talks"
    columns = Columns(
        images=np.repeat([1, 0, 2, 0], [20, 10, 6, 4]),
        text=np.arange(COUNT) + 1,
        width=np.zeros(COUNT, np.int64),
        height=np.zeros(COUNT, np.int64),
        source=np.repeat([0, 1, 2], [20, 10, 10]),
        sources=("coco", "", "gqa"),
    )

    def __len__(self) -> int:
        return COUNT

    def key(self, index: int, /) -> str:
        return f"talk {index}"

    def describe(self) -> str:
        return "40 talks"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(table: object) -> list[list[str]]:
    """The cells of a table's rows."""
    console = Console(width=300, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines() if "│" in line]


def run_with(**values: object) -> RunConfig:
    defaults = {"name": "talks", "batch_size": 8, "micro_batch_size": 4, "token_budget": 90, "window": 16}
    return RunConfig(data=DataConfig(**{**defaults, **values}))  # type: ignore[arg-type]


def slow(stream: Stream) -> Iterator[list[int]]:
    """The rows' lengths of every forward, read from the plan sample by sample."""
    held = [min(max(int(length), 1), CAPACITY) for length in LENGTHS]
    for batch in stream.epoch_batches(0):
        size = stream.config.micro_batch_size or 1
        for start in range(0, len(batch), size):
            units = [unit for unit in batch[start : start + size] if unit]
            if stream.config.batching is Batching.packed:
                yield [sum(held[number] for number in unit) for unit in units]
            else:
                yield [held[number] for unit in units for number in unit]


@pytest.mark.parametrize("batching", Batching)
def test_padding_is_that_of_the_batches(batching: Batching) -> None:
    stream = Stream(Talks(), under(run_with().data, batching), 0, lengths=LENGTHS, capacity=CAPACITY)  # type: ignore[arg-type]
    found, forwards = waste(stream, LENGTHS, CAPACITY), [rows for rows in slow(stream) if rows]
    assert found.used == LENGTHS.clip(1, CAPACITY).sum()
    assert found.positions == sum(len(rows) * max(rows) for rows in forwards)
    assert found.forwards == len(forwards)
    assert found.padding == 1 - found.used / found.positions
    assert found.steps == len(list(stream.epoch_batches(0)))
    if batching in (Batching.samples, Batching.modality_length):
        assert (found.units, found.steps, found.forwards) == (40, 5, 10)
    if batching is Batching.token_budget:
        assert max(len(rows) * max(rows) for rows in forwards) <= 90


def test_every_batching_has_its_row_and_says_what_is_planned() -> None:
    table, notes = batchings_table(Talks(), LENGTHS, CAPACITY, run_with())  # type: ignore[arg-type]
    rows = {row[0]: row[1:] for row in written(table)}
    assert list(rows) == [batching.name for batching in Batching]
    assert not notes
    assert rows["samples"][:3] == ["5", "40", "4"]
    assert rows["token_budget"][2] == "1"
    padding = {name: float(row[-1].rstrip("%")) for name, row in rows.items()}
    assert padding["token_budget"] < padding["samples"]
    assert padding["packed"] < padding["samples"]


def test_a_batching_that_cannot_be_says_why_and_the_others_are_shown() -> None:
    table, notes = batchings_table(Talks(), LENGTHS, CAPACITY, run_with(token_budget=20))  # type: ignore[arg-type]
    rows = {row[0]: row[1:] for row in written(table)}
    assert rows["token_budget"] == ["-"] * 5
    assert "-" not in rows["packed"]
    (note,) = notes
    assert note.startswith("data.batching=token_budget: talk ")
    assert "data.token_budget=20" in note


def test_sources_are_counted_with_their_images_and_positions() -> None:
    rows = {row[0]: row[1:] for row in written(sources_table(Talks(), LENGTHS, CAPACITY, run_with()))}  # type: ignore[arg-type]
    held = LENGTHS.clip(1, CAPACITY)
    assert rows == {
        "coco": ["20", "50.0%", "100.0%", "20", f"{held[:20].mean():.0f}"],
        "(unnamed)": ["10", "25.0%", "0.0%", "0", f"{held[20:30].mean():.0f}"],
        "gqa": ["10", "25.0%", "60.0%", "12", f"{held[30:].mean():.0f}"],
    }


def test_what_is_refused_and_what_is_cut_is_said_before_training() -> None:
    lines = "\n".join(facts(Talks(), LENGTHS, CAPACITY, run_with()))  # type: ignore[arg-type]
    over = LENGTHS[LENGTHS > CAPACITY]
    assert "40 talks\nan epoch is 40 samples in 5 batches of 8" in lines
    assert f"{(LENGTHS == 0).sum()} of 40 samples will be refused" in lines
    assert f"{len(over)} of 40 samples ({len(over) / 40:.2%}) are longer than llm.max_length=30" in lines
    assert f"{(over - 30).sum()} positions will be cut" in lines


def test_the_plan_of_a_run_counts_the_positions_that_its_batches_have(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths come from outlines alone, batches from images and text."""
    run = run_of(*PAGES)
    assert shards_plan.run(run, {}) == 0
    said = capsys.readouterr().out
    processor = make_processor(run)
    train, _ = open_sources(run.data)
    prepared = PreparedSource(train, processor.prepare, processor.blank)
    lengths = lengths_of(train, processor, replace(run, data=under(run.data, Batching.packed)))
    assert lengths is not None
    made = [len(processor.prepare(train[number]).input_ids) for number in range(len(prepared))]
    assert lengths.tolist() == made
    assert f"An epoch of fine_print: 6 samples, {sum(made):,} positions" in said
    assert "an epoch is 6 samples in 2 batches of 4" in said
    assert all(batching.name in said for batching in Batching)
    assert len(list(Path(run.data.cache).glob("lengths-*.npy"))) == 1, "kept for the run"


def test_a_stream_without_an_index_cannot_be_planned() -> None:
    run = run_of("data=shards", "data.root=r", "data.stream=webdataset", "data.urls=a.tar", "data.batching=samples")
    with pytest.raises(ValueError, match=r"data\.stream=webdataset: .* Plan with data\.stream=indexed"):
        shards_plan.run(run, {})
