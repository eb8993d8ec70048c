"""The stream: what is read is a function of (fingerprint, seed, step), whoever reads it, and however it is divided."""

from collections import Counter
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import Numbers, mixed

from deepstack_pl.data.config import Batching, DataConfig, Remainder, Shuffle
from deepstack_pl.data.planning import Planner
from deepstack_pl.data.stream import (
    FILL,
    MicroBatchSampler,
    Position,
    Stream,
    micro_batches,
)

CAPACITY = 50
LARGE = 8 * 48  # samples that fill a batch of 4 x 4 x 3 units, whatever is planned


def stream_of(n: int = 10, seed: int = 3, source: Numbers | None = None, **config: object) -> Stream:
    source = mixed(n - n // 3, n // 3) if source is None else source
    lengths = np.random.default_rng(1).integers(1, CAPACITY + 20, len(source))  # some of them will be cut
    values = DataConfig(**{"name": "numbers", "batch_size": 4, "token_budget": 64, "window": 5, "block": 3, **config})  # type: ignore[arg-type]
    return Stream(source, values, seed, lengths=lengths, capacity=CAPACITY)


def remade(stream: Stream, config: DataConfig | None = None) -> Stream:
    """The same stream, of another process or another day."""
    lengths = np.random.default_rng(1).integers(1, CAPACITY + 20, len(stream.source))
    return Stream(stream.source, config or stream.config, stream.seed, lengths=lengths, capacity=CAPACITY)


def samples_of(batches: object) -> list[int]:
    return [number for units in batches for unit in units for number in unit]  # type: ignore[attr-defined]


START = Position()


def first(stream: Stream, steps: int, start: Position = START) -> list[tuple]:
    return [units for units, _ in islice(stream.batches(start), steps)]


def epoch_of(stream: Stream, epoch: int = 0) -> list[tuple]:
    return list(stream.epoch_batches(epoch))


@st.composite
def streams(draw: st.DrawFn) -> tuple[Stream, int, int, int]:
    """Any stream, and world, accumulation and micro-batch size that its batches are divided by."""
    world, accumulation, micro = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n = draw(st.one_of(st.sampled_from([1, 3, 17, LARGE]), st.integers(1, 60)))
    stream = stream_of(
        n,
        draw(st.integers(0, 5)),
        batch_size=world * accumulation * micro,
        batching=draw(st.sampled_from(Batching)),
        shuffle=draw(st.sampled_from(Shuffle)),
        window=draw(st.sampled_from((1, 2, 3, 8, 100))),
        block=draw(st.integers(1, 7)),
        remainder=draw(st.sampled_from(Remainder)) if n >= LARGE else Remainder.pad,
    )
    return stream, world, accumulation, micro


@settings(deadline=None)
@given(streams())
def test_an_epoch_holds_every_sample_once_in_full_batches_whatever_the_batching(
    drawn: tuple[Stream, int, int, int],
) -> None:
    stream = drawn[0]
    for epoch in (0, 1):
        batches = epoch_of(stream, epoch)
        assert all(len(units) == stream.config.batch_size for units in batches)
        assert all(units[0] for units in batches), "no batch holds nothing"
        assert () not in chain(*batches[:-1]), "only the last is filled up"
        if stream.config.remainder is Remainder.drop:
            assert max(Counter(samples_of(batches)).values()) == 1
            assert () not in batches[-1]
            filled = replace(stream.config, remainder=Remainder.pad)
            assert len(batches) >= len(epoch_of(remade(stream, filled), epoch)) - 1
        else:
            assert sorted(samples_of(batches)) == list(range(stream.samples))


@settings(deadline=None)
@given(streams())
def test_processes_share_a_batch_without_loss_or_doubling_and_run_as_many_forwards(
    drawn: tuple[Stream, int, int, int],
) -> None:
    stream, world, accumulation, micro = drawn
    for units in epoch_of(stream):
        ranks = [micro_batches(units, rank, world, micro) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {accumulation}
        in_order = [part for forwards in zip(*ranks, strict=True) for part in forwards]
        assert tuple(chain(*in_order)) == units


@settings(deadline=None)
@given(streams())
def test_a_resume_at_any_step_goes_on_with_the_batches_that_would_have_come(
    drawn: tuple[Stream, int, int, int],
) -> None:
    stream = drawn[0]
    fresh = remade(stream)
    whole = list(islice(stream.batches(START), 10))
    before = Position()
    for step in range(9):
        assert fresh.position(step) == before
        assert list(islice(fresh.batches(before), 2)) == whole[step : step + 2]
        before = whole[step][1]


@settings(deadline=None, max_examples=30)
@given(streams(), st.integers(0, 5))
def test_the_sampler_of_each_process_is_its_share_from_any_step_on(
    drawn: tuple[Stream, int, int, int], step: int
) -> None:
    stream, world, accumulation, micro = drawn
    start = stream.position(step)
    expected = first(stream, 3, start)
    for rank in range(world):
        sampler = MicroBatchSampler(stream, start, steps=3, rank=rank, world=world, size=micro)
        found = list(sampler)
        assert len(found) == len(sampler) == 3 * accumulation
        mine = [batch for units in expected for batch in micro_batches(units, rank, world, micro)]
        if stream.config.batching is Batching.packed:
            assert found == [[unit or (FILL,) for unit in batch] for batch in mine]
        else:
            assert found == [[number for unit in batch for number in unit or (FILL,)] for batch in mine]
        assert sampler.position(step + 3) == stream.position(step + 3)


def test_the_order_depends_on_fingerprint_seed_and_epoch_and_on_nothing_else() -> None:
    def numbers(fingerprint: str = "a", seed: int = 0, epoch: int = 0, **config: object) -> tuple[int, ...]:
        stream = stream_of(seed=seed, source=Numbers(100, fingerprint), **config)
        return tuple(samples_of(epoch_of(stream, epoch)))

    assert len({numbers(f, s, e) for f in "ab" for s in range(3) for e in range(3)}) == 18
    assert numbers() == numbers(workers=4, micro_batch_size=1)
    assert numbers() == numbers(batch_size=7)
    assert numbers() != numbers(shuffle=Shuffle.blocks)


def test_the_orders_are_what_they_were_when_runs_were_made() -> None:
    """A change here is a change of every run's data: raise ORDER_VERSION."""
    found = {
        (batching.name, shuffle.name): samples_of(epoch_of(stream_of(10, batching=batching, shuffle=shuffle)))
        for batching in Batching
        for shuffle in Shuffle
    }
    assert found == GOLDEN


@pytest.mark.parametrize("batching", Batching)
def test_what_does_not_fill_a_batch_is_dropped_where_that_is_asked_for_and_it_is_said(batching: Batching) -> None:
    stream = stream_of(17, batching=batching, remainder=Remainder.drop)
    filled = remade(stream, replace(stream.config, remainder=Remainder.pad))
    full = sum(unit != () for units in filled.epoch_batches(0) for unit in units) // 4
    batches = epoch_of(stream)
    assert len(batches) == full
    assert () not in chain(*batches)
    assert max(Counter(samples_of(batches)).values()) == 1
    assert "dropped" in stream.describe()
    assert first(stream, 3, stream.position(full)) == first(stream, full + 3)[-3:]


def test_what_an_epoch_is_is_said() -> None:
    assert stream_of(10).describe() == (
        "an epoch is 10 samples in 3 batches of 4; the last one holds 2 and is filled up with empty rows"
    )
    assert stream_of(12).describe() == "an epoch is 12 samples in 3 batches of 4"
    assert "in steps of 4 packed rows" in stream_of(12, batching=Batching.packed).describe()


@pytest.mark.parametrize("batching", Batching)
def test_nothing_to_read_is_refused(batching: Batching) -> None:
    with pytest.raises(ValueError, match=r"0 numbers: there is nothing to train on\. Add samples"):
        stream_of(source=Numbers(0), batching=batching)


@pytest.mark.parametrize("batching", Batching)
def test_an_epoch_without_a_full_batch_cannot_drop_its_remainder(batching: Batching) -> None:
    with pytest.raises(ValueError, match=r"data\.remainder=drop with data\.batch_size=64.*data\.remainder=pad"):
        stream_of(17, batching=batching, remainder=Remainder.drop, batch_size=64)


def units_an_epoch(stream: Stream, epoch: int) -> int:
    filled = remade(stream, replace(stream.config, remainder=Remainder.pad))
    return sum(unit != () for units in filled.epoch_batches(epoch) for unit in units)


def test_an_epoch_too_short_for_a_batch_is_dropped_whole_and_no_batch_is_short() -> None:
    """How many rows are packed differs between epochs."""
    stream = next(
        stream
        for seed in range(100)
        for stream in [stream_of(17, seed, batching=Batching.packed, remainder=Remainder.pad)]
        if units_an_epoch(stream, 0) > units_an_epoch(stream, 1)
    )
    values = replace(stream.config, remainder=Remainder.drop, batch_size=units_an_epoch(stream, 0))
    stream = remade(stream, values)
    steps = list(islice(stream.batches(START), 5))
    assert all(() not in units for units, _ in steps)
    assert steps[0][1].epoch > 1
    assert [stream.position(step) for step in range(1, 6)] == [after for _, after in steps]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_run_may_go_on_with_other_processes_and_accumulation_at_every_step(data: st.DataObject) -> None:
    batching, shuffle = data.draw(st.sampled_from(Batching)), data.draw(st.sampled_from(Shuffle))
    stream = stream_of(data.draw(st.sampled_from([1, 3, 17, 70])), batch_size=12, batching=batching, shuffle=shuffle)
    expected, found, position = first(stream, 6), [], Position()
    for step in range(6):
        world = data.draw(st.integers(1, 4))
        size = data.draw(st.sampled_from([size for size in (1, 2, 3, 4, 6, 12) if not 12 % (world * size)]))
        samplers = [
            MicroBatchSampler(remade(stream), position, steps=1, rank=rank, world=world, size=size)
            for rank in range(world)
        ]
        found.append([row for forwards in zip(*samplers, strict=True) for batch in forwards for row in batch])
        ends = {sampler.position(step + 1) for sampler in samplers}
        assert len(ends) == 1, "every process goes on at the same place"
        position = ends.pop()
    if batching is Batching.packed:
        assert found == [[unit or (FILL,) for unit in units] for units in expected]
    else:
        assert found == [[number for unit in units for number in unit or (FILL,)] for units in expected]


@pytest.mark.parametrize("batching", Batching)
def test_a_position_beyond_its_epoch_is_refused(batching: Batching) -> None:
    with pytest.raises(ValueError, match=r"unit=400\): no batch begins there\. It is of other data"):
        first(stream_of(10, batching=batching), 1, Position(unit=400))


@pytest.mark.parametrize("window", [1, 5, 64, 1000])
def test_windows_are_planned_once_each(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: Counter[str] = Counter()
    units = Planner.units

    def counted(self: Planner, numbers: np.ndarray, text: str) -> list:
        planned[text] += 1
        return units(self, numbers, text)

    monkeypatch.setattr(Planner, "units", counted)
    for remainder in Remainder:
        planned.clear()
        stream = stream_of(1000, batching=Batching.packed, batch_size=16, window=window, remainder=remainder)
        list(stream.epoch_batches(0))
        assert set(planned.values()) == {1}
        assert len(planned) >= 1000 // window


def test_a_resume_plans_the_window_it_begins_in_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(1000, batching=Batching.packed, batch_size=4, window=50)
    before = next(after for _, after in stream.batches(START) if after.window == 10)
    planned: list[str] = []
    units = Planner.units
    monkeypatch.setattr(Planner, "units", lambda *args: planned.append(args[-1]) or units(*args))
    first(remade(stream), 1, before)
    assert {int(text.split()[-1]) for text in planned} <= {10, 11}


GOLDEN = {
    ("samples", "full"): [5, 9, 4, 1, 6, 7, 3, 0, 2, 8],
    ("samples", "blocks"): [8, 6, 9, 7, 3, 5, 2, 4, 1, 0],
    ("modality_length", "full"): [1, 4, 6, 5, 0, 2, 3, 9, 8, 7],
    ("modality_length", "blocks"): [2, 3, 6, 5, 0, 1, 4, 9, 8, 7],
    ("token_budget", "full"): [1, 6, 9, 5, 4, 7, 3, 8, 2, 0],
    ("token_budget", "blocks"): [7, 6, 3, 9, 8, 2, 1, 0, 5, 4],
    ("packed", "full"): [1, 5, 4, 6, 9, 7, 3, 8, 2, 0],
    ("packed", "blocks"): [7, 6, 3, 9, 8, 2, 1, 5, 4, 0],
}
