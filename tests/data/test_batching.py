"""Batches of like samples: against a slow spelling-out of LLaVA's sampler, and within their budgets."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import mixed
from test_stream import epoch_of, samples_of, stream_of

from deepstack_pl.data.batching import bins, by_modality_and_length
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import Batching, Remainder, Shuffle
from deepstack_pl.data.order import shuffled


def published(order: list[int], lengths: list[int], batch: int, text: str) -> list[list[int]]:
    """LLaVA's ``get_modality_length_grouped_indices`` with its permutations given: ``lengths`` below zero are those of
    samples without an image, ``order`` is its randperm over all, ``text`` names that over the megabatches.

    What differs, on purpose: lengths are not spread over processes within a megabatch (``split_to_even_chunks``), for
    that depends on their number; a megabatch that happens to be full is never part of the last, mixed one; and the
    mixed one is longest first too.
    """
    kinds = [[i for i in order if lengths[i] > 0], [i for i in order if lengths[i] < 0]]
    megabatches: list[list[int]] = []
    additional: list[list[int]] = []
    for indices in kinds:
        parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        parts = [sorted(part, key=lambda i: abs(lengths[i]), reverse=True) for part in parts]
        if parts and len(parts[-1]) < batch:
            additional.append(parts.pop())
        megabatches += parts
    megabatches = [megabatches[i] for i in shuffled(len(megabatches), f"{text} batches")]
    return [*megabatches, *additional]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(0, 9))
def test_batches_are_those_of_the_published_sampler(images: int, texts: int, batch: int, seed: int) -> None:
    source = mixed(images, texts, seed)
    order = shuffled(images + texts, f"{seed}")
    columns = source.columns
    lengths = [int(text) if image else -int(text) for text, image in zip(columns.text, columns.images, strict=True)]
    expected = [i for part in published(order.tolist(), lengths, batch, "x") for i in part]
    assert by_modality_and_length(order, columns, batch, "x").tolist() == expected


def test_full_batches_are_of_one_kind_longest_first_and_of_all_lengths() -> None:
    source = mixed(1000, 100)
    columns: Columns = source.columns
    stream = stream_of(source=source, batch_size=64, batching=Batching.modality_length)
    batches = [np.array(samples_of([units])) for units in epoch_of(stream)]
    whole = 1000 // 64 + 100 // 64
    assert all(len(np.unique(columns.images[batch])) == 1 for batch in batches[:whole])
    assert all((np.diff(columns.text[batch]) <= 0).all() for batch in batches[:whole])
    assert any(columns.images[batch[0]] == 0 for batch in batches[:whole])
    assert sorted(np.concatenate(batches)) == list(range(1100))


def test_a_sample_that_an_epoch_repeats_is_repeated_in_its_batches() -> None:
    columns = mixed(4, 2).columns
    order = np.array([0, 5, 1, 0, 2, 3, 4, 4, 1])
    assert sorted(by_modality_and_length(order, columns, 2, "x")) == sorted(order)


def test_what_is_dropped_is_no_likelier_to_be_text() -> None:
    """Dropped after sorting, it always was."""
    source = mixed(1000, 100)
    dropped: Counter[bool] = Counter()
    for seed in range(40):
        stream = stream_of(
            seed=seed, source=source, batch_size=64, batching=Batching.modality_length, remainder=Remainder.drop
        )
        left = set(range(1100)) - set(samples_of(epoch_of(stream)))
        assert len(left) == 1100 % 64
        dropped.update(number < 1000 for number in left)
    assert 0.85 < dropped[True] / dropped.total() < 0.97


def test_grouping_by_modality_keeps_blocks_near_each_other() -> None:
    """Else every batch would open a shard of its own."""
    stream = stream_of(
        source=mixed(20000, 2000),
        batch_size=64,
        batching=Batching.modality_length,
        shuffle=Shuffle.blocks,
        block=128,
        window=1024,
    )
    read = np.array(samples_of(epoch_of(stream)))[: 1024 * 20].reshape(20, -1)
    assert np.mean([len(np.unique(window // 128)) for window in read]) < 25


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 300))
def test_bins_hold_every_sample_once_and_no_more_than_the_budget_with_padding(lengths: list[int], budget: int) -> None:
    numbers = np.arange(100, 100 + len(lengths))
    units = bins(numbers, np.array(lengths), budget)
    assert sorted(number for unit in units for number in unit) == numbers.tolist()
    padded = [len(unit) * max(lengths[number - 100] for number in unit) for unit in units]
    assert max(padded) <= budget
    for unit, following in pairwise(units):
        longest = max(lengths[number - 100] for number in unit)
        assert (len(unit) + 1) * longest > budget, "one more would not have fitted"
        assert min(lengths[n - 100] for n in unit) >= max(lengths[n - 100] for n in following), "like lengths together"


def test_a_sample_longer_than_the_budget_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^\d+ has 50 positions, more than data\.token_budget=49: .* Raise"):
        stream_of(100, batching=Batching.token_budget, token_budget=49)


def test_a_sample_that_will_be_cut_counts_as_it_is_after_the_cut() -> None:
    stream = stream_of(100, batching=Batching.token_budget, token_budget=50)
    lengths = np.random.default_rng(1).integers(1, 70, 100).clip(1, 50)
    for units in stream.epoch_batches(0):
        for unit in units:
            assert not unit or len(unit) * lengths[list(unit)].max() <= 50
