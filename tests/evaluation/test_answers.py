"""Scores of answers against the official scorers, worked by hand; and that neither order nor processes count."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import distributed

from deepstack_pl.evaluation import vqa_words
from deepstack_pl.evaluation.answer_metric import AnswerMetric
from deepstack_pl.evaluation.answers import (
    ANLS,
    ExactMatch,
    MultipleChoice,
    RelaxedAccuracy,
    VQAAccuracy,
    VQAv2Accuracy,
    YesNo,
    chosen,
    levenshtein,
)
from deepstack_pl.evaluation.intervals import clustered_interval, wilson_interval
from deepstack_pl.evaluation.task import Question

EVERY: list[type[AnswerMetric]] = [
    VQAAccuracy, VQAv2Accuracy, ANLS, RelaxedAccuracy, ExactMatch, YesNo, MultipleChoice
]  # fmt: skip
CHOICES = ("A dog", "a cat", "B", "a.m.")


def ask(*answers: str, kind: str = "", image: str = "1.jpg", choices: tuple[str, ...] = ()) -> Question:
    return Question(key="1", image=image, prompt="?", answers=answers, kind=kind, choices=choices)


# VQA: https://visualqa.org/evaluation.html, and the rules of vqaEval.py and of MMF's EvalAIAnswerProcessor.


@pytest.mark.parametrize(
    ("said", "server", "official"),
    [
        ("Two Dogs.", "2 dogs", "2 dogs"),
        ("the cat, a mat!", "cat mat", "cat mat"),
        ("None", "0", "0"),
        ("dont", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("couldntve", "couldntve", "couldntve"),  # with both missing it is not in the tables
        ("somebody'd", "somebodyd", "somebodyd"),  # an oddity of the tables
        ("it's", "it 's", "it's"),  # only the server parts it
        ("red/blue", "red blue", "red blue"),  # a mark within a word is a space
        ("red /blue", "red blue", "red blue"),  # beside a space it is nothing
        ("1,000 red-ish", "1000 red ish", "1000 redish"),  # a comma in a number lets all marks vanish
        ("1,,000 red-ish", "1000 red ish", "1 000 red ish"),  # two commas are none in a number
        ("3.5 ft.", "3.5 ft", "3.5 ft"),  # a full stop before a digit stays
        ("U.S.A", "usa", "usa"),
        (" a\tb\nc ", "b c", "b c"),
        ("", "", ""),
    ],
)
def test_words_are_written_as_the_scorers_write_them(said: str, server: str, official: str) -> None:
    assert (vqa_words.of_server(said), vqa_words.official(said)) == (server, official)


def test_the_scorers_replace_no_more_than_32_full_stops() -> None:
    assert vqa_words.official("a." * 40 + "b") == "a" * 33 + ".a" * 7 + ".b"


def test_as_many_people_as_agree_without_each_in_turn_make_the_score() -> None:
    metric = VQAAccuracy()
    # k of ten: ((10 - k) min(1, k / 3) + k min(1, (k - 1) / 3)) / 10
    expected = [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]
    for agree, score in enumerate(expected):
        assert metric.score(ask(*["stop"] * agree, *["go"] * (10 - agree)), "Stop.") == score
    assert VQAv2Accuracy().score(ask(*["stop"] * 3, *["go"] * 7), "a stop") == 0.9


def test_vqa_v2_leaves_answers_as_they_are_where_all_people_agree() -> None:
    metric = VQAv2Accuracy()
    assert metric.score(ask(*["yes"] * 10), "Yes") == 1.0
    assert metric.score(ask(*["U.S."] * 10), "U.S.") == 1.0  # as said
    assert metric.score(ask(*["U.S."] * 10), "us") == 0.0  # nobody's answer is rewritten
    assert metric.score(ask(*["U.S."] * 9, "us"), "us") == 1.0
    assert VQAAccuracy().score(ask(*["U.S."] * 10), "us") == 1.0
    assert metric.score(ask(*["men's"] * 5, *["man"] * 5), "Men's") == 1.0


# DocVQA and InfographicVQA: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, the challenge's script.


@pytest.mark.parametrize(
    ("answers", "said", "score"),
    [
        (("kitten",), "sitting", 1 - 3 / 7),
        (("Coca  Cola",), "coca cola", 1.0),
        (("ab",), "ax", 0.5),  # a half still counts
        (("abc",), "axx", 0.0),  # a third does not
        (("pepsi", "1,000"), "1.000", 1 - 1 / 5),
        (("a  b",), "a c", 1 - 1 / 4),  # space counts as length
        (("",), "", 1.0),
        (("yes",), "", 0.0),
    ],
)
def test_anls_is_one_minus_the_share_of_edits_and_nothing_below_a_half(
    answers: tuple[str, ...], said: str, score: float
) -> None:
    assert ANLS().score(ask(*answers), said) == score


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
@example("kitten", "sitting", "")
def test_the_distance_of_words_is_a_distance(first: str, second: str, third: str) -> None:
    assert levenshtein(first, second) == levenshtein(second, first)
    assert (levenshtein(first, second) == 0) == (first == second)
    assert levenshtein(first, third) <= levenshtein(first, second) + levenshtein(second, third)
    assert abs(len(first) - len(second)) <= levenshtein(first, second) <= max(len(first), len(second))


# ChartQA: Masry et al., section 5.1; the handling of percentages is that of Qwen-VL's evaluate_vqa.py.


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("100", "105", True),
        ("100", "95.0", True),
        ("100", "105.1", False),
        ("-20", "-19", True),
        ("-20", "20", False),
        ("5%", "5.2%", True),
        ("5%", "0.05", True),
        ("5%", "5", False),  # a percentage is a hundredth
        ("5%", "5%%", True),  # the published scorer strips them all
        ("0", "0", True),
        ("0", "0.0", False),  # no number is within 5 % of none
        ("Yes", "yes ", True),
        ("Ted Baker", "Ted", False),
        ("2013", "twenty", False),
        ("1,000", "1000", False),  # no number to the published scorer
        ("nan", "NaN", True),  # words
        ("inf", "1", False),
        ("10", "inf", False),
    ],
)
def test_numbers_may_be_five_percent_off_and_words_not_at_all(answer: str, said: str, right: bool) -> None:
    assert RelaxedAccuracy().score(ask(answer), said) == right


# GQA: eval.py compares strings; LLaVA's convert_gqa_for_eval.py strips full stops and lower-cases the prediction.


@pytest.mark.parametrize(
    ("said", "right"), [("Dog.", True), (" dog\n", True), ("dog...", True), ("dogs", False), ("a dog", False)]
)
def test_an_exact_match_is_one_but_for_case_and_a_last_full_stop(said: str, right: bool) -> None:
    assert ExactMatch().score(ask("dog"), said) == right


# POPE: LLaVA's eval_pope.py. The counts and the F1 are LLaVA-1.5's on the random part, haotian-liu/LLaVA issue 626.


def test_f1_is_that_of_published_counts() -> None:
    metric = YesNo()
    counts = {("yes", "Yes"): 1183, ("no", "Yes"): 31, ("no", "No"): 1379, ("yes", "No"): 317}
    rows = [pair for pair, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(rows)
    for place, (label, said) in enumerate(rows):
        metric.update(ask(label, image=f"{place % 500}.jpg"), said)
    found = metric.compute()["all"]
    assert found["f1"] == pytest.approx(0.8717759764185703, abs=1e-15)
    assert found["accuracy"] == pytest.approx(0.8804123711340206, abs=1e-15)
    assert found["precision"] == pytest.approx(0.9744645799011532, abs=1e-15)
    assert found["recall"] == pytest.approx(0.7886666666666666, abs=1e-15)
    assert found["yes_ratio"] == 1214 / 2910
    assert (found["samples"], found["pictures"], found["unparsed"]) == (2910, 500, 0)
    low, high = found["ci95"]
    assert low < found["f1"] < high
    # A ratio over independent answers: the squares of 2 - 2 F1 (1183 times) and of F1 (348 times) sum to 342.3
    assert high - low == pytest.approx(2 * 1.96 * 342.3**0.5 / (1214 + 1500), rel=0.1)
    assert found["accuracy_ci95"][0] < found["accuracy"] < found["accuracy_ci95"][1]


@pytest.mark.parametrize(
    ("said", "no", "unparsed"),
    [
        ("No", True, 0),
        ("no, it is a cat", True, 0),
        ("There is not a dog.", True, 0),
        ("Yes. No", False, 0),  # the first sentence alone
        ("Yes, there is", False, 0),
        ("No!", False, 1),  # as the scorer has it: a mark makes it another word, and what is no no is a yes
        ("NO", False, 1),
        ("a cat", False, 1),
        ("", False, 1),
    ],
)
def test_what_does_not_say_no_is_a_yes_and_counted_if_it_says_neither(said: str, no: bool, unparsed: int) -> None:
    metric = YesNo()
    assert metric.score(ask("no"), said) == no
    assert metric.score(ask("yes"), said) != no
    metric.update(ask("yes"), said)
    assert metric.compute()["all"]["unparsed"] == unparsed


def test_the_interval_of_f1_is_never_a_point() -> None:
    every_right, none_said, no_yes = YesNo(), YesNo(), YesNo()
    for place in range(20):
        every_right.update(ask("yes", image=f"{place}"), "yes")
        none_said.update(ask("yes", image=f"{place}"), "no")
        no_yes.update(ask("no", image=f"{place}"), "no")
    assert every_right.compute()["all"]["ci95"] == list(wilson_interval(20, 20, 0.95))
    assert none_said.compute()["all"]["ci95"] == list(wilson_interval(0, 20, 0.95))
    assert (none_said.compute()["all"]["f1"], none_said.compute()["all"]["precision"]) == (0.0, 0.0)
    assert no_yes.compute()["all"]["ci95"] == [0.0, 1.0]
    assert no_yes.compute()["all"]["accuracy"] == 1.0


# SEED-Bench: the option's letter, as LLaVA's convert_seed_for_submission.py compares.


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"), ("b", "B"), ("C.", "C"), ("(D)", "D"), ("(b).", "B"), ("B: a cat", "B"), ("B. a dog", "B"),
        ("A.dog", "A"), ("B)cat", "B"), ("(C)it", "C"), ("D:a.m.", "D"), ("B.), a cat", "B"), ("B, a cat", "B"),
        ("B,cat", None),
        ("A\nbecause", "A"), ("a dog", "A"), ("A cat.", "B"), ("a.m.", "D"), ("B", "B"), ("A bird", None), ("E", None),
        ("Dog", None), ("The answer is B", None), ("", None),
    ],
)  # fmt: skip
def test_an_option_is_named_by_its_letter_or_its_text(said: str, letter: str | None) -> None:
    assert chosen(CHOICES, said) == letter
    metric = MultipleChoice()
    metric.update(ask("B", choices=CHOICES), said)
    found = metric.compute()["all"]
    assert (found["accuracy"], found["unparsed"]) == (letter == "B", letter is None)


def test_options_of_one_text_are_told_apart_by_letters_alone() -> None:
    assert chosen(("red", "red", "blue"), "red") is None
    assert chosen(("red", "red", "blue"), "B") == "B"
    assert chosen((), "A") is None


# What all scores have in common.

PREDICTIONS = ["yes", "No.", "A", "4", "3.9", "a dog", "", "not a cat", "Yes"]


def some(metric: AnswerMetric, rows: list[tuple[Question, str]]) -> AnswerMetric:
    for question, said in rows:
        metric.update(question, said)
    return metric


def mixed(seed: int, count: int = 60) -> list[tuple[Question, str]]:
    """Questions of three kinds about ten pictures, with answers that fit every score."""
    pick = random.Random(seed)
    rows = []
    for _ in range(count):
        label = pick.choice(("yes", "no", "A", "4"))
        answers = [label, *(pick.choice(PREDICTIONS) for _ in range(9))]
        kind = pick.choice(("human", "größer", "x"))
        rows.append(
            (ask(*answers, kind=kind, image=str(pick.randrange(10)), choices=CHOICES), pick.choice(PREDICTIONS))
        )
    return rows


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_depends_on_the_order_of_answers(kind: type[AnswerMetric]) -> None:
    rows = mixed(0)
    found = some(kind(), rows).compute()
    assert list(found) == ["all", "größer", "human", "x"]
    assert some(kind(), rows[::-1]).compute() == found
    assert some(kind(), random.Random(1).sample(rows, len(rows))).compute() == found


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", EVERY)
def test_two_halves_merged_are_the_whole_even_where_kinds_are_in_one_half_alone(kind: type[AnswerMetric]) -> None:
    rows = sorted(mixed(2), key=lambda row: row[0].kind)
    first, second = some(kind(), rows[:40]), some(kind(), rows[40:])
    first.merge_state(second)
    assert first.compute() == some(kind(), rows).compute()
    empty = kind()
    empty.merge_state(first)
    assert empty.compute() == first.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_metric_that_is_reset_has_forgotten_its_kinds() -> None:
    metric = some(ExactMatch(), mixed(3))
    metric.reset()
    assert metric.compute() == {}
    metric.update(ask("4", kind="human"), "4")
    assert list(metric.compute()) == ["all"]


def _one_of_two(rank: int, folder: str, shares: list[int]) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    start = sum(shares[:rank])
    metrics = [some(kind(), mixed(4)[start : start + shares[rank]]) for kind in EVERY]
    torch.save([metric.compute() for metric in metrics], f"{folder}/{rank}.pt")
    for metric in metrics:  # syncing leaves the process's own answers as they were
        assert len(metric.rows) == shares[rank] or (shares[rank] == 0 and len(metric.rows[0]) == 0)
    distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("shares", [[45, 15], [60, 0]])
def test_two_processes_find_what_one_does_even_if_one_of_them_has_no_answers(shares: list[int], tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_one_of_two, args=(str(tmp_path), shares), nprocs=2, start_method="fork")
    alone = [some(kind(), mixed(4)).compute() for kind in EVERY]
    assert torch.load(tmp_path / "0.pt") == alone
    assert torch.load(tmp_path / "1.pt") == alone


@pytest.mark.parametrize("kind", [VQAAccuracy, ANLS])
def test_a_mean_and_its_interval_are_worked_as_by_hand(kind: type[AnswerMetric]) -> None:
    metric = kind()
    metric.update(ask(*["stop"] * 10, image="1.jpg"), "stop")
    metric.update(ask(*["stop"] * 10, image="1.jpg"), "go")
    metric.update(ask(*["stop"] * 10, image="2.jpg"), "stop")
    found = metric.compute()
    assert found == {
        "all": {
            metric.headline: 2 / 3,
            "ci95": list(clustered_interval([1, 1], [2, 1], 0.95)),
            "samples": 3,
            "pictures": 2,
        }
    }


def test_a_confidence_that_is_no_share_is_refused() -> None:
    for wrong in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=r"evaluation\.confidence=.* is a share"):
            ExactMatch(wrong)
    assert "ci80" in some(ExactMatch(0.8), mixed(5)).compute()["all"]


def test_agreement_never_falls_where_another_person_agrees() -> None:
    metric = VQAAccuracy()
    scores = [metric.score(ask(*["x"] * agree, *["y"] * (10 - agree)), "x") for agree in range(11)]
    assert all(fewer <= more for fewer, more in pairwise(scores))


ANY = st.text(max_size=12)
OF_WORDS = [VQAAccuracy(), VQAv2Accuracy(), ANLS(), RelaxedAccuracy(), ExactMatch()]
CHOICE, YES_NO = MultipleChoice(), YesNo()


@settings(deadline=None)
@given(st.lists(ANY, min_size=1, max_size=10), ANY, st.sampled_from("ABCD"))
@example(["", "nan"], "inf", "A")
@example(["İ"], "i", "B")
def test_every_score_is_a_share_and_the_right_answer_has_all_of_it(answers: list[str], said: str, letter: str) -> None:
    for metric in OF_WORDS:
        assert 0 <= metric.score(ask(*(answers * 10)[:10]), said) <= 1
        assert metric.score(ask(*answers[:1] * 10), answers[0]) == 1
    assert CHOICE.score(ask(letter, choices=CHOICES), letter) == 1
    assert CHOICE.score(ask(letter, choices=CHOICES), said) in (0, 1)
    assert {YES_NO.score(ask("yes"), said), YES_NO.score(ask("no"), said)} == {0, 1}
