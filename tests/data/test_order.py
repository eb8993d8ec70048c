"""Permutations: all of a set, by a text alone, the same on every machine and in every year."""

import numpy as np
import pytest

from deepstack_pl.data.order import blocks, draws, order, shuffled, shuffled_within


def test_the_orders_are_what_they_were_when_runs_were_made() -> None:
    """`order` says which records are held out: it may never change."""
    assert order(10, 0, 0).tolist() == [4, 5, 2, 3, 9, 0, 6, 1, 8, 7]
    assert shuffled(8, "a").tolist() == SHUFFLED
    assert blocks(8, 2, 4, "a").tolist() == BLOCKS


def test_the_order_of_held_out_records_is_a_permutation() -> None:
    assert sorted(order(100, 0, 0)) == list(range(100))
    assert len({tuple(order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("n", [0, 1, 3, 17, 1000])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (3, 5), (128, 4096), (7, 2)])
def test_every_permutation_holds_every_number_once(n: int, block: int, window: int) -> None:
    for permutation in (shuffled(n, "a"), shuffled_within(n, window, "a"), blocks(n, block, window, "a")):
        assert sorted(permutation) == list(range(n))


def test_a_permutation_is_that_of_its_text() -> None:
    found = {tuple(permute(50, text)) for text in ("a", "b", "c") for permute in (shuffled, _blocks)}
    assert len(found) == 6
    assert shuffled(50, "a").tolist() == shuffled(50, "a").tolist()


def _blocks(n: int, text: str) -> np.ndarray:
    return blocks(n, 5, 10, text)


def test_every_place_is_as_likely() -> None:
    counts = np.zeros((6, 6), int)
    for seed in range(3000):
        counts[np.arange(6), shuffled(6, str(seed))] += 1
    assert counts.min() > 400
    assert counts.max() < 600


def test_a_shuffle_within_windows_leaves_each_where_it_is() -> None:
    found = shuffled_within(95, 10, "a")
    assert (found // 10 == np.arange(95) // 10).all()
    assert (found != np.arange(95)).mean() > 0.7


def test_blocks_keep_neighbours_within_a_window_and_still_change_places() -> None:
    numbers = blocks(1000, 10, 50, "a")
    windows = numbers.reshape(20, 50)
    assert all(len(np.unique(window // 10)) == 5 for window in windows)
    assert not any((np.diff(window) == 1).all() for window in windows)
    assert len({int(window.min()) for window in windows}) == 20
    assert any(np.ptp(window) > 60 for window in windows), "blocks from afar meet"


def test_no_draw_touches_the_global_streams() -> None:
    before = np.random.get_state()[1].copy()
    draws(100, "a")
    assert (np.random.get_state()[1] == before).all()


SHUFFLED = [2, 0, 1, 7, 4, 5, 6, 3]
BLOCKS = [7, 6, 4, 5, 1, 2, 0, 3]
