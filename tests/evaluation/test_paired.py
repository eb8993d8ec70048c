"""Paired differences against every draw there is, and what is refused."""

from itertools import product

import numpy as np
import pytest

from deepstack_pl.evaluation.intervals import wilson_interval
from deepstack_pl.evaluation.paired import bootstrap, difference, holm, interval


def scores(*right: int, facts: int = 4) -> dict[str, tuple[int, int]]:
    return {f"s{place}": (value, facts) for place, value in enumerate(right)}


def test_a_difference_is_that_of_the_facts_and_its_interval_is_of_all_draws_there_are() -> None:
    ours, theirs = {0: scores(4, 3, 0, 2)}, {0: scores(1, 3, 1, 0)}
    found = difference(ours, theirs, confidence=0.9)
    assert found.delta == pytest.approx((3 + 0 - 1 + 2) / 16)
    assert (found.samples, found.seeds, found.flipped) == (4, 1, 6)
    every = np.array([sum((3, 0, -1, 2)[i] for i in draw) / 16 for draw in product(range(4), repeat=4)])
    assert found.low == pytest.approx(np.quantile(every, 0.05), abs=0.07)
    assert found.high == pytest.approx(np.quantile(every, 0.95), abs=0.07)
    signs = [
        abs(sum(s * d for s, d in zip(each, (3, 0, -1, 2), strict=True))) >= 4 for each in product((1, -1), repeat=4)
    ]
    assert found.p == pytest.approx(np.mean(signs))


def test_samples_weigh_as_many_facts_as_they_hold() -> None:
    ours = {0: {"long": (8, 8), "short": (0, 2)}}
    theirs = {0: {"long": (0, 8), "short": (2, 2)}}
    assert difference(ours, theirs).delta == pytest.approx(6 / 10)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Both have the same mean difference; in one it is of every seed, in the other of one seed alone."""
    every = {seed: scores(*[2] * 30) for seed in range(3)}
    one = {0: scores(*[4] * 30), 1: scores(*[2] * 30), 2: scores(*[0] * 30)}
    nothing = {seed: scores(*[1] * 30) for seed in range(3)}
    steady, lucky = difference(every, nothing), difference(one, nothing)
    assert steady.delta == pytest.approx(lucky.delta)
    assert steady.high - steady.low < 0.01
    assert lucky.high - lucky.low > 0.5
    assert lucky.p > 0.05 > steady.p


def test_what_is_hard_for_both_counts_for_neither() -> None:
    """Paired, a fact more on every sample is certain, however much the samples differ among themselves."""
    generator = np.random.default_rng(1)
    base = [int(value) for value in generator.integers(0, 10, size=40)]
    ours = {0: scores(*[value + 1 for value in base], facts=12)}
    found = difference(ours, {0: scores(*base, facts=12)})
    assert found.low == pytest.approx(1 / 12)
    assert found.high == pytest.approx(1 / 12)
    assert interval(ours)[1] - interval(ours)[0] > 0.1


@pytest.mark.parametrize(("samples", "p"), [(1, 1), (2, 0.5), (5, 2 / 32), (10, 2 / 1024)])
def test_few_samples_that_all_agree_are_few(samples: int, p: float) -> None:
    found = difference({0: scores(*[4] * samples)}, {0: scores(*[0] * samples)})
    assert found.p == pytest.approx(p)
    assert found.low == pytest.approx(wilson_interval(samples, samples, 0.95)[0])
    assert found.high == 1


def test_an_arm_against_itself_is_no_difference() -> None:
    arm = {0: scores(1, 2, 3)}
    found = difference(arm, arm)
    assert (found.delta, found.low, found.high, found.p, found.flipped) == (0, 0, 0, 1, 0)


def test_a_true_null_is_found_in_one_of_twenty() -> None:
    """Arms that differ by chance alone: p below 0.05 about as often as that."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        ours, theirs = ({0: scores(*generator.integers(0, 5, size=60).tolist())} for _ in range(2))
        found += difference(ours, theirs, draws=400).p < 0.05
    assert 2 <= found <= 22


@pytest.mark.parametrize(("theirs", "why"), [({1: scores(1, 2)}, "seeds"), ({0: scores(1, 2, 3)}, "other samples")])
def test_what_is_not_paired_is_refused(theirs: dict[int, dict[str, tuple[int, int]]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        difference({0: scores(1, 2)}, theirs)


def test_draws_come_in_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, facts = np.arange(12.0).reshape(2, 6), np.full(6, 4.0)
    whole = bootstrap(values, facts, 200)[1]
    monkeypatch.setattr("deepstack_pl.evaluation.paired._CHUNK", 60)
    chunks = bootstrap(values, facts, 200)[1]
    assert len(chunks) == 200
    assert chunks.mean() == pytest.approx(whole.mean(), abs=0.1)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
