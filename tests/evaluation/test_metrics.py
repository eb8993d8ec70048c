"""Accuracy and its intervals, against examples worked by hand."""

from statistics import NormalDist

import numpy as np
import pytest

from deepstack_pl.evaluation.intervals import clustered_interval, effective_facts, interval_name, wilson_interval
from deepstack_pl.evaluation.metrics import FactAccuracy, score

Z = NormalDist().inv_cdf(0.975)


def test_several_facts_are_matched_word_by_word_in_order():
    assert score("red teal gold", ("red", "gold", "gold")) == [True, False, True]
    assert score("  red\nteal ", ("red", "teal", "gold")) == [True, True, False]
    assert score("red teal gold navy", ("red", "teal")) == [True, True]
    assert score("", ("red", "teal")) == [False, False]


def test_a_single_fact_is_the_whole_answer():
    assert score(" a dog on a sofa\n", ("a dog on a sofa",)) == [True]
    assert score("a dog on a sofa today", ("a dog on a sofa",)) == [False]


def test_facts_that_cannot_be_told_apart_by_position_are_refused():
    with pytest.raises(ValueError, match=r"fact 'light red' is one of 2.*make it one word"):
        score("light red teal", ("light red", "teal"))
    with pytest.raises(ValueError, match="no facts to score"):
        score("red", ())


def test_wilson_agrees_with_a_hand_worked_example():
    # 8 of 10: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.71674, half-width 0.22657
    assert wilson_interval(8, 10, 0.95) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_wilson_keeps_a_width_at_the_ends_and_stays_within_them():
    low, high = wilson_interval(10, 10, 0.95)
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(10 / (10 + Z * Z))
    assert wilson_interval(0, 10, 0.95)[0] == 0.0


def test_a_higher_confidence_is_a_wider_interval():
    narrow, wide = wilson_interval(30, 50, 0.8), wilson_interval(30, 50, 0.99)
    assert wide[0] < narrow[0] < 0.6 < narrow[1] < wide[1]


def test_the_effective_number_agrees_with_a_hand_worked_example():
    # Four pages of two facts, right: 2 2 1 0. p = 5/8; residuals 0.75 0.75 -0.25 -1.25, squares sum to 2.75;
    # variance 4/3 * 2.75 / 64; p(1 - p) / variance = 0.234375 / 0.0572917
    assert effective_facts([2, 2, 1, 0], [2, 2, 2, 2]) == pytest.approx(0.234375 / (4 / 3 * 2.75 / 64))


def test_facts_that_stand_and_fall_together_count_as_one():
    samples = [4] * 30 + [0] * 20
    assert effective_facts(samples, [4] * 50) == pytest.approx(49, rel=1e-9)
    together, apart = clustered_interval(samples, [4] * 50, 0.95), wilson_interval(120, 200, 0.95)
    assert together[0] < apart[0] < 0.6 < apart[1] < together[1]


def test_where_nothing_varies_each_sample_counts_as_one_fact():
    assert clustered_interval([8] * 20, [8] * 20, 0.95) == pytest.approx(wilson_interval(20, 20, 0.95))
    assert clustered_interval([0] * 20, [8] * 20, 0.95) == pytest.approx(wilson_interval(0, 20, 0.95))
    assert effective_facts([1], [2]) == 1


def test_the_interval_never_promises_more_than_independent_facts_would():
    assert effective_facts([1, 1, 1, 1], [2, 2, 2, 2]) == 8


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    facts, covered, trials = 16, 0, 400
    for _ in range(trials):
        skill = rng.beta(4, 1, size=64)  # pages differ: mean 0.8
        right = rng.binomial(facts, skill).tolist()
        low, high = clustered_interval(right, [facts] * 64, 0.95)
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / trials <= 0.98


def test_kinds_are_kept_apart():
    metric = FactAccuracy(["coarse", "fine", "never"])
    metric.update("coarse", [True, True], True)
    metric.update("coarse", [True, False], False)
    metric.update("fine", [False], False)
    found = metric.compute()
    assert set(found) == {"coarse", "fine"}
    assert (found["coarse"]["accuracy"], found["coarse"]["exact_match"]) == (0.75, 0.5)
    assert (found["coarse"]["facts"], found["coarse"]["samples"]) == (4, 2)
    assert found["coarse"]["exact_match_ci95"] == list(wilson_interval(1, 2, 0.95))
    assert found["fine"]["accuracy"] == 0.0
    metric.reset()
    assert metric.rows == []


def test_the_interval_is_called_by_its_confidence():
    metric = FactAccuracy(["fine"], confidence=0.9)
    metric.update("fine", [True, False], False)
    assert "ci90" in metric.compute()["fine"]
    assert interval_name(0.95) == "ci95"


def test_what_cannot_be_counted_is_refused():
    metric = FactAccuracy(["fine"])
    with pytest.raises(ValueError, match="kind 'coarse', but the metric was made for"):
        metric.update("coarse", [True], True)
    with pytest.raises(ValueError, match="without a single fact"):
        metric.update("fine", [], True)
    with pytest.raises(ValueError, match=r"evaluation\.confidence=95"):
        FactAccuracy(["fine"], confidence=95)
