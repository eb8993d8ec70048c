"""Scores of answers, as each benchmark's official scorer gives them, as torchmetrics."""

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any, ClassVar

import numpy as np

from deepstack_pl.evaluation import vqa_words
from deepstack_pl.evaluation.answer_metric import AnswerMetric, Rows, by_picture, counts, mean
from deepstack_pl.evaluation.intervals import clustered_interval, interval_name
from deepstack_pl.evaluation.paired import bootstrap
from deepstack_pl.evaluation.task import Question

DRAWS = 10_000


class VQAAccuracy(AnswerMetric):
    """How many of ten people gave the answer, three being enough, without one of them in turn (TextVQA's score).

    Both are written as `vqa_words.of_server` does.
    """

    headline = "vqa_accuracy"

    def score(self, question: Question, prediction: str) -> float:
        said = vqa_words.of_server(prediction)
        return agreement([vqa_words.of_server(answer) == said for answer in question.answers])


class VQAv2Accuracy(AnswerMetric):
    """The same as VQA v2's scorer has it: people's answers are rewritten only where they differ.

    Versions of that scorer differ in whether they rewrite the prediction where all people agree: the first did, the
    last does not, and would have "Yes" wrong where all said "yes". Here either way of writing it is right then.
    """

    headline = "vqa_accuracy"

    def score(self, question: Question, prediction: str) -> float:
        answers = [vqa_words.one_line(answer) for answer in question.answers]
        said = vqa_words.official(prediction)
        if len(set(answers)) == 1:
            return float(answers[0] in (vqa_words.one_line(prediction), said))
        return agreement([vqa_words.official(answer) == said for answer in answers])


def agreement(matches: Sequence[bool]) -> float:
    """``min(1, matches / 3)`` without one answer in turn, on average: 0.3, 0.6, 0.9 and 1 of ten answers."""
    total = sum(matches)
    return sum(min(3, total - match) for match in matches) / (3 * len(matches))


class ANLS(AnswerMetric):
    """Average normalised Levenshtein similarity to the closest answer; what is below a half is nothing.

    As the scorers of DocVQA's challenges have it: case and space do not count as differences, but space counts as
    length.
    """

    headline = "anls"
    threshold: ClassVar[float] = 0.5

    def score(self, question: Question, prediction: str) -> float:
        closest = max(1 - self._distance(answer, prediction) for answer in question.answers)
        return closest if closest >= self.threshold else 0.0

    @staticmethod
    def _distance(answer: str, prediction: str) -> float:
        length = max(len(answer.upper()), len(prediction.upper()))
        if not length:
            return 0.0
        return levenshtein(*(" ".join(text.strip().lower().split()) for text in (answer, prediction))) / length


def levenshtein(first: str, second: str) -> int:
    """How many letters must be put in, left out or exchanged to make one of the other."""
    before = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        now = [row]
        for column, other in enumerate(second, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (letter != other)))
        before = now
    return before[-1]


class RelaxedAccuracy(AnswerMetric):
    """Within 5 % of a number, else the same words but for case (ChartQA, section 5.1; code: Qwen-VL's and lmms-eval's).

    A percentage is a hundredth, so that 5 is not 5%; nothing but itself is close to a zero.
    """

    headline = "relaxed_accuracy"
    tolerance: ClassVar[float] = 0.05

    def score(self, question: Question, prediction: str) -> float:
        return float(any(self._close(prediction.strip(), answer.strip()) for answer in question.answers))

    def _close(self, prediction: str, answer: str) -> bool:
        said, right = _as_number(prediction), _as_number(answer)
        if said is not None and right:
            return abs(said - right) / abs(right) <= self.tolerance
        return prediction.lower() == answer.lower()


def _as_number(text: str) -> float | None:
    """What ``text`` says; None where it says no finite number."""
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if isfinite(number) else None


class ExactMatch(AnswerMetric):
    """The answer itself, but for case and a full stop at the end (GQA's eval.py after LLaVA's convert_gqa_for_eval)."""

    headline = "exact_match"

    def score(self, question: Question, prediction: str) -> float:
        said = prediction.strip().rstrip(".").lower()
        return float(any(said == answer.strip().rstrip(".").lower() for answer in question.answers))


class YesNo(AnswerMetric):
    """Accuracy, precision, recall and F1 of "yes", as LLaVA's and POPE's own scorer has them (eval_pope.py).

    As there, an answer is a no if its first sentence holds the word "no", "No" or "not", and else a yes, whatever it
    says. ``unparsed`` counts those that hold neither such a word nor a yes. A share of nothing is 0. The interval of F1
    is a bootstrap over pictures.
    """

    headline = "f1"
    columns = 4  # right, said yes, is yes, unparsed

    def score(self, question: Question, prediction: str) -> float:
        return float(_says_no(prediction) == (question.answers[0] == "no"))

    def values(self, question: Question, prediction: str) -> tuple[float, ...]:
        no = _says_no(prediction)
        unparsed = not no and "yes" not in re.findall(r"\w+", prediction.lower())
        return (self.score(question, prediction), not no, question.answers[0] == "yes", unparsed)

    def summary(self, rows: Rows) -> dict[str, Any]:
        said, right = sum(row[2] for row in rows), sum(row[3] for row in rows)
        both = sum(row[2] * row[3] for row in rows)
        name = interval_name(self.confidence)
        return {
            "f1": 2 * both / (said + right) if said + right else 0.0,
            name: self._f1_interval(rows),
            "accuracy": mean(rows),
            f"accuracy_{name}": self.interval(rows),
            "precision": both / said if said else 0.0,
            "recall": both / right if right else 0.0,
            "yes_ratio": said / len(rows),
            "unparsed": int(sum(row[4] for row in rows)),
            **counts(rows),
        }

    def _f1_interval(self, rows: Rows) -> list[float]:
        """F1 is twice the yeses that are right, per yes that is said or right: a ratio of sums over pictures."""
        sums = by_picture([(row[0], 2 * row[2] * row[3], row[2] + row[3]) for row in rows])
        hits, yeses = sums[sums[:, 1] > 0].T
        if not len(yeses):
            return [0.0, 1.0]  # nobody says yes: nothing is known of it
        if len(yeses) == 1 or hits.sum() in (0, yeses.sum()):  # every draw would be the same
            return list(clustered_interval(hits.tolist(), yeses.astype(int).tolist(), self.confidence))
        _, drawn = bootstrap(hits[None], yeses, DRAWS)
        low, high = np.quantile(drawn, [0.5 - self.confidence / 2, 0.5 + self.confidence / 2])
        return [float(low), float(high)]


def _says_no(prediction: str) -> bool:
    words = prediction.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.isdisjoint(words)


class MultipleChoice(AnswerMetric):
    """The right option: by its letter (``B``, ``b.``, ``(B)``, ``B: a dog``, ``B.dog``), or by its text alone.

    ``unparsed`` counts answers that name no option; they are wrong.
    """

    headline = "accuracy"
    columns = 2

    def score(self, question: Question, prediction: str) -> float:
        return float(chosen(question.choices, prediction) == question.answers[0])

    def values(self, question: Question, prediction: str) -> tuple[float, ...]:
        return (self.score(question, prediction), chosen(question.choices, prediction) is None)

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {**super().summary(rows), "unparsed": int(sum(row[2] for row in rows))}


def chosen(choices: Sequence[str], prediction: str) -> str | None:
    """The letter of the option that ``prediction`` names, None where it names none.

    A letter alone is a letter, whatever the options say; one that goes on as a sentence does ("A dog") is a word.
    """
    if not choices:
        return None
    said = prediction.strip()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    if alone := re.fullmatch(rf"\(?([{letters}])[).:,]*", said, re.I):
        return alone[1].upper()
    same = [letter for letter, text in zip(letters, choices, strict=True) if _plain(text) == _plain(said)]
    if len(same) == 1:
        return same[0]
    first = re.match(rf"\(?([{letters}])([).:,]*[).:]|,+\s|\n)", said, re.I)
    return first[1].upper() if first else None


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
