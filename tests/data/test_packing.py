"""Packed rows: within the capacity, nothing split or lost, nearly as few as can be; and what they are as a batch."""

import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.data.packing import in_one_row, packs


def rows_of(lengths: list[int] | np.ndarray, capacity: int) -> list[list[int]]:
    lengths = np.asarray(lengths)
    return [[int(lengths[number]) for number in unit] for unit in packs(np.arange(len(lengths)), lengths, capacity)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 200))
def test_every_sample_is_in_one_row_and_no_row_is_over_its_capacity(lengths: list[int], capacity: int) -> None:
    units = packs(np.arange(100, 100 + len(lengths)), np.array(lengths, np.int64), capacity)
    assert sorted(number for unit in units for number in unit) == list(range(100, 100 + len(lengths)))
    assert all(0 < sum(lengths[number - 100] for number in unit) <= capacity for unit in units)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_rows_are_those_of_best_fit_spelt_out(lengths: list[int], capacity: int) -> None:
    """Longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        roomy = [row for row in rows if sum(row) + length <= capacity]
        if roomy:
            max(roomy, key=sum).append(length)
        else:
            rows.append([length])
    assert sorted(map(sorted, rows_of(lengths, capacity))) == sorted(map(sorted, rows))


def fewest_by_trying(lengths: list[int], capacity: int) -> int:
    """Every way to fill rows, for a few samples."""
    best = len(lengths)

    def put(left: list[int], rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if not left:
            best = len(rooms)
            return
        for place in range(len(rooms)):
            if rooms[place] >= left[0]:
                put(left[1:], [room - left[0] * (at == place) for at, room in enumerate(rooms)])
        put(left[1:], [*rooms, capacity - left[0]])

    put(sorted(lengths, reverse=True), [])
    return best


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(20, 40))
def test_rows_are_nearly_as_few_as_can_be(lengths: list[int], capacity: int) -> None:
    assert len(rows_of(lengths, capacity)) <= fewest_by_trying(lengths, capacity) + 1


def test_rows_are_nearly_full_where_several_samples_fit_into_one() -> None:
    """Lengths like LLaVA-665K's. Where an image is 576 positions, two samples fill 2048 to 1400 or so and a third does
    not fit: no plan mends that, a larger capacity does.
    """
    text = np.clip(np.random.default_rng(0).lognormal(5.2, 0.7, 4096), 60, 1400).astype(int)
    for lengths, capacity, least in ((text, 2048, 0.97), (text + 144, 4096, 0.97), (text + 576, 8192, 0.96)):
        assert lengths.sum() / (len(rows_of(lengths, capacity)) * capacity) >= least
    assert 0.8 < (text + 576).sum() / (len(rows_of(text + 576, 2048)) * 2048) < 0.9


def test_packed_rows_side_by_side_hold_no_padding_however_full_they_are() -> None:
    """Lengths like LLaVA-665K's in rows of 2,048: each row by itself leaves a seventh of it empty."""
    text = np.clip(np.random.default_rng(0).lognormal(5.2, 0.7, 512), 60, 1400).astype(int)
    lengths = text + 576
    samples = [with_images(key, [], text=int(length)) for key, length in enumerate(lengths)]
    rows = [[samples[number] for number in unit] for unit in packs(np.arange(512), lengths, 2048)]
    random.Random(0).shuffle(rows)  # as a stream does: full ones and others share a batch

    def padding(make: Callable[[list], MultimodalBatch]) -> float:
        batches = [make(rows[start : start + 8]) for start in range(0, len(rows), 8)]
        return 1 - lengths.sum() / sum(batch.input_ids.numel() for batch in batches)

    assert padding(partial(in_one_row, batch_of)) <= 0.03
    assert padding(batch_of) > 0.1


def test_a_window_is_packed_in_a_blink() -> None:
    """Which a plan that looks at every row for every sample is not; a generous limit, for busy machines."""
    lengths = np.random.default_rng(0).integers(1, 400, 40_000)
    begin = time.process_time()
    rows_of(lengths, 2048)
    assert time.process_time() - begin < 2


T, P, G, H = 4, 9, 3, 2  # tokens and patches of a view, groups in the LLM and in the tower


def with_images(key: int, tiles: list[int], text: int = 3) -> Sample:
    """A sample of an image for each of ``tiles``, of so many tiles each; every number in it tells where it is from."""
    views, slots = len(tiles) + sum(tiles), len(tiles) * T
    token_index = torch.cat([torch.full((text,), -1), torch.arange(slots)])
    rows = torch.Generator().manual_seed(key)

    def drawn(*shape: int, per_view: int) -> torch.Tensor:
        return torch.randint(-2, max(1, views * per_view), shape, generator=rows) if views else torch.empty(*shape)

    length = text + slots
    return Sample(
        key=str(key),
        input_ids=torch.arange(length) + 1000 * key,
        labels=torch.arange(length) + 1000 * key,
        views=torch.arange(views, dtype=torch.uint8)[:, None, None, None].expand(views, 3, 2, 2) + 10 * key,
        images=len(tiles),
        token_index=token_index,
        sequence_rows=drawn(slots, per_view=T).long(),
        group_rows=drawn(G, slots, per_view=T).long(),
        vit_rows=drawn(H, len(tiles) * P, per_view=P).long(),
        cut=key,
        source=f"source {key}",
    )


def batch_of(rows: list, side: PadSide = PadSide.right) -> MultimodalBatch:
    return collate(rows, pad_id=-7, side=side, tokens_per_view=T, patches_per_view=P)


def told(batch: MultimodalBatch, row: int, segment: int) -> list:
    """All that a batch says of one sample, in values that do not depend on what stands beside it."""
    place = batch.segment_ids[row] == segment
    index = batch.token_index[row][place]
    slots = index[index >= 0]
    globals_ = int(batch.views.shape[0])

    def pixels(rows: torch.Tensor, per_view: int) -> list:
        found = rows.flatten().tolist()
        return [at if at < 0 else (int(batch.views[at // per_view, 0, 0, 0]), at % per_view) for at in found]

    assert globals_
    return [
        batch.input_ids[row][place].tolist(),
        batch.position_ids[row][place].tolist(),
        batch.labels[row][place][1:].tolist(),
        (index >= 0).tolist(),
        pixels(batch.sequence_rows[slots], T),
        pixels(batch.group_rows[:, slots], T),
    ]


SAMPLES = [with_images(1, [2]), with_images(2, []), with_images(3, [0, 3]), with_images(4, [1], 6), with_images(5, [])]


@pytest.mark.parametrize("side", PadSide)
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[1, 4], [0]], [[4, 3, 2, 1, 0]], [[2], [1, 0], [3, 4]]])
def test_a_segment_is_what_the_sample_is_alone(rows: list[list[int]], side: PadSide) -> None:
    batch = batch_of([[SAMPLES[number] for number in row] for row in rows], side)
    for row, numbers in enumerate(rows):
        for segment, number in enumerate(numbers, 1):
            assert told(batch, row, segment) == told(batch_of([SAMPLES[number]]), 0, 1)
    in_order = [number for row in rows for number in row]
    assert batch.keys == [SAMPLES[number].key for number in in_order]
    assert (batch.sources, batch.cuts) == (
        [SAMPLES[n].source for n in in_order],
        [SAMPLES[n].cut for n in in_order],
    )
    ids = batch.sample_ids()
    assert (ids == -1).equal(batch.segment_ids == 0)
    for place, key in enumerate(batch.keys):
        assert (batch.input_ids[ids == place] // 1000 == int(key)).all()


@pytest.mark.parametrize("side", PadSide)
def test_the_tower_reads_for_each_image_what_it_would_alone(side: PadSide) -> None:
    packed = batch_of([[SAMPLES[0], SAMPLES[2]], [SAMPLES[3]]], side)
    apart = batch_of([SAMPLES[0], SAMPLES[2], SAMPLES[3]], side)
    assert torch.equal(packed.vit_rows, apart.vit_rows)
    assert torch.equal(packed.views, apart.views)


@pytest.mark.parametrize("side", PadSide)
def test_no_segment_is_learned_from_the_one_before(side: PadSide) -> None:
    batch = batch_of([[SAMPLES[0], SAMPLES[1], SAMPLES[2]], [SAMPLES[4]]], side)
    for row, segments in ((0, 3), (1, 1)):
        for segment in range(1, segments + 1):
            labels = batch.labels[row][batch.segment_ids[row] == segment]
            first = [IGNORE_INDEX] if segment > 1 else [batch.input_ids[row][batch.segment_ids[row] == 1][0].item()]
            assert labels[:1].tolist() == first
            assert IGNORE_INDEX not in labels[1:]
    padding = batch.segment_ids == 0
    assert (batch.labels[padding] == IGNORE_INDEX).all()
    assert (batch.token_index[padding] == -1).all()
    assert (batch.input_ids[padding] == -7).all()
    assert torch.equal(batch.attention_mask, ~padding)


def test_rows_of_one_segment_are_the_samples_themselves() -> None:
    one, other = batch_of([[sample] for sample in SAMPLES]), batch_of(SAMPLES)
    for name, value in one.model_inputs().items():
        assert torch.equal(value, other.model_inputs()[name]), name
    assert torch.equal(one.segment_ids, other.segment_ids)


def test_packed_rows_without_an_image_carry_the_blank_view() -> None:
    batch = batch_of([[SAMPLES[1], SAMPLES[4]], [SAMPLES[1]]])
    assert batch.views.shape == (1, 3, 2, 2)
    assert not batch.views.any()
    assert (batch.token_index == -1).all()
