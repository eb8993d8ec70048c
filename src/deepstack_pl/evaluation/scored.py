"""Answers of two models to the same questions, from what evaluations keep: who is better, how surely, and where."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstack_pl.evaluation.answer_metric import ALL
from deepstack_pl.evaluation.benchmark import Line
from deepstack_pl.evaluation.kept import RECORDS, read_lines, read_results
from deepstack_pl.evaluation.paired import Difference, difference, holm

PREDICTIONS = "predictions.jsonl"
_FEW = 10  # pictures


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer.

    Attributes:
        index: its place in what was asked.
        picture: answers about one picture are not independent; they are drawn together.
        right: how much of it is right, of ``of``.
    """

    index: int
    key: str
    kind: str
    prompt: str
    prediction: str
    answers: tuple[str, ...]
    picture: str
    right: float
    of: int


@dataclass(frozen=True, slots=True)
class Answered:
    """What one model answered: of a benchmark, or of a run's held-out samples.

    Attributes:
        fingerprint: of the questions.
        headline: what the benchmark's own number is called, and what it is.
    """

    folder: Path
    name: str
    fingerprint: str
    lines: Mapping[str, Scored]
    facts: dict[str, Any]
    headline: tuple[str, float] | None


@dataclass(frozen=True, slots=True)
class Row:
    """Of one kind: both means, and what lies between them."""

    kind: str
    ours: float
    theirs: float
    difference: Difference
    p: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models on the same questions.

    Attributes:
        rows: of all questions, then of each kind; p-values of kinds are corrected by Holm.
        better, worse: where the first answered better, and where the second did; the largest differences first.
        notes: what does not meet.
    """

    ours: Answered
    theirs: Answered
    rows: list[Row]
    better: list[tuple[Scored, Scored]]
    worse: list[tuple[Scored, Scored]]
    same: int
    notes: list[str]


def read_answered(folder: Path) -> Answered:
    """What an evaluation kept in ``folder``, or, in a run's folder, its last evaluation of its held-out samples.

    Raises:
        ValueError: there is none that came to its end.
    """
    results = read_results(folder)
    if (folder / RECORDS).is_file():
        lines = [_of_benchmark(line) for line in read_lines(folder / RECORDS)]
        headline = next(((name, value) for name, value in results["metrics"][ALL].items()), None)
        return Answered(folder, results["name"], results["fingerprint"], _by_key(lines), results, headline)
    if not (folder / PREDICTIONS).is_file():
        raise ValueError(f"{folder}: no answers lie there ({RECORDS} or {PREDICTIONS}). Evaluate it with evaluate.py.")
    fingerprint = results["fingerprint"] if "fingerprint" in results else results["data"]["fingerprint"]["val"]
    lines = [_of_facts(values) for values in _read(folder / PREDICTIONS)]
    return Answered(folder, "held_out", fingerprint, _by_key(lines), results, None)


def pair(ours: Answered, theirs: Answered, *, confidence: float = 0.95) -> Pair:
    """Compare two models, question by question.

    Raises:
        ValueError: they were asked different things.
    """
    if ours.fingerprint != theirs.fingerprint:
        raise ValueError(
            f"{ours.folder} and {theirs.folder} were asked different questions: fingerprints {ours.fingerprint[:12]} "
            f"and {theirs.fingerprint[:12]}. Evaluate both on the same files."
        )
    keys = [key for key in ours.lines if key in theirs.lines]
    if not keys:
        raise ValueError(f"{ours.folder} and {theirs.folder}: no question was asked of both. Evaluate both alike.")
    both = [(ours.lines[key], theirs.lines[key]) for key in keys]
    kinds = sorted({line.kind for line, _ in both})
    parts = {kind: [each for each in both if each[0].kind == kind] for kind in kinds} if len(kinds) > 1 else {}
    found = {kind: _between(lines, confidence) for kind, lines in {ALL: both, **parts}.items()}
    ps = dict(zip(parts, holm([found[kind].p for kind in parts]), strict=True))
    rows = [Row(kind, *_means(parts.get(kind, both)), each, ps.get(kind, each.p)) for kind, each in found.items()]
    apart = sorted(both, key=lambda each: -abs(_gain(each)))
    return Pair(
        ours,
        theirs,
        rows,
        better=[each for each in apart if _gain(each) > 0],
        worse=[each for each in apart if _gain(each) < 0],
        same=sum(_gain(each) == 0 for each in both),
        notes=_notes(ours, theirs, both),
    )


def _between(both: Sequence[tuple[Scored, Scored]], confidence: float) -> Difference:
    """Of both by the first one's pictures: the same, under whatever name."""
    sides = ({0: _by_picture([(each[0].picture, each[side]) for each in both])} for side in (0, 1))
    return difference(*sides, confidence=confidence)


def _by_picture(lines: Sequence[tuple[str, Scored]]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for picture, line in lines:
        right, of = found.get(picture, (0.0, 0))
        found[picture] = (right + line.right, of + line.of)
    return found


def _means(both: Sequence[tuple[Scored, Scored]]) -> tuple[float, float]:
    of = sum(ours.of for ours, _ in both)
    return sum(ours.right for ours, _ in both) / of, sum(theirs.right for _, theirs in both) / of


def _gain(both: tuple[Scored, Scored]) -> float:
    return both[0].right / both[0].of - both[1].right / both[1].of


def _notes(ours: Answered, theirs: Answered, both: Sequence[tuple[Scored, Scored]]) -> list[str]:
    notes = []
    for one, other in ((ours, theirs), (theirs, ours)):
        alone = len(one.lines) - len(both)
        if alone:
            notes.append(f"{alone:,} questions were asked of {one.folder} and not of {other.folder}: not compared")
    prompts = sum(a.prompt != b.prompt for a, b in both)
    if prompts:
        notes.append(f"{prompts:,} of {len(both):,} questions were put in other words")
    for name in ("injections", "dtype", "attention", "hardware"):
        notes += _differ(name, ours.facts.get(name), theirs.facts.get(name))
    for group in ("task", "versions"):
        a, b = ours.facts.get(group, {}), theirs.facts.get(group, {})
        for name in a:
            notes += _differ(f"{group}.{name}", a[name], b.get(name)) if name in b else []
    for one in (ours, theirs):
        if one.facts.get("not_asked"):
            notes.append(
                f"{len(one.facts['not_asked']):,} questions were not asked of {one.folder}, and count as wrong"
            )
    pictures = len({line.picture for line, _ in both})
    if pictures < _FEW:
        notes.append(f"{pictures} pictures are too few to say much")
    return notes


def _differ(name: str, a: Any, b: Any) -> list[str]:
    return [f"{name} differs: {a} and {b}"] if a != b and a is not None and b is not None else []


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(text) for text in file.read_text(encoding="utf-8").split("\n") if text]
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}). Evaluate again with fresh=true.") from error


def _by_key(lines: Sequence[Scored]) -> dict[str, Scored]:
    return {line.key: line for line in lines}


def _of_benchmark(its: Line) -> Scored:
    return Scored(
        its.index, its.key, its.kind, its.prompt, its.prediction, its.answers, its.image, right=its.score, of=1
    )


def _of_facts(its: dict[str, Any]) -> Scored:
    same = {name: its[name] for name in ("index", "key", "kind", "prompt", "prediction")}
    right, of = sum(its["correct"]), len(its["correct"])
    return Scored(**same, answers=(its["answer"],), picture=its["key"], right=right, of=of)
