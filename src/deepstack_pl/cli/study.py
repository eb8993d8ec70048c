"""Runs that are compared, of a sweep or not: arms, the seeds of each, paired differences. Loads without torch."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepstack_pl.cli.arms import read_arms, reason, state
from deepstack_pl.cli.folders import relative
from deepstack_pl.cli.report import interval_of, read_results
from deepstack_pl.evaluation.paired import Difference, Scores, difference, holm, interval

PREDICTIONS = "predictions.jsonl"


@dataclass(slots=True)
class Arm:
    """One point of a study, with as many seeds as were run.

    Attributes:
        words: what was typed for it that others have otherwise, by key.
        runs: results by seed; all finished.
        folders: where each run lies.
    """

    name: str
    words: dict[str, str]
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    _scores: dict[tuple[int, str], Scores] = field(default_factory=dict)

    @property
    def one(self) -> dict[str, Any]:
        """The results of one seed, for what is the same in all."""
        return next(iter(self.runs.values()))

    def accuracy(self, kind: str) -> float:
        """The mean over seeds."""
        return _mean(run["metrics"][kind]["accuracy"] for run in self.runs.values())

    def interval(self, kind: str) -> tuple[float, float]:
        if len(self.runs) > 1:
            return interval({seed: self.scores(seed, kind) for seed in self.runs})
        low, high = interval_of(self.one["metrics"][kind]) or (self.accuracy(kind),) * 2
        return low, high

    def on_the_way(self, kind: str) -> float | None:
        """Accuracy, averaged over the validations of training: who learns sooner has more."""
        points = [p[kind] for run in self.runs.values() for p in run.get("curve", []) if kind in p]
        return _mean(points) if points else None

    def cost(self, name: str) -> float | None:
        """One of `COSTS`, the mean over seeds; None where a run does not say."""
        values = [COSTS[name].of(run) for run in self.runs.values()]
        known = [value for value in values if value]
        return _mean(known) if len(known) == len(values) else None

    def scores(self, seed: int, kind: str) -> Scores:
        """Right facts and facts of each sample of ``kind``."""
        if (seed, kind) not in self._scores:
            lines = (self.folders[seed] / PREDICTIONS).read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            self._scores[seed, kind] = {
                r["key"]: (sum(r["correct"]), len(r["correct"])) for r in records if r["kind"] == kind
            }
        return self._scores[seed, kind]


@dataclass(frozen=True, slots=True)
class Cost:
    """What quality is held against."""

    label: str
    of: Callable[[dict[str, Any]], float | None]  # of a run's results; None or 0 where it does not say
    more_is_worse: bool = True


COSTS = {
    "context": Cost("context tokens an image", lambda run: run["tokens_per_image"]["context"]),
    "flops": Cost("training FLOPs", lambda run: run.get("flops")),
    "memory": Cost("peak memory, GB", lambda run: max(run.get("peak_memory_bytes", {}).values(), default=0) / 1e9),
    "speed": Cost("tokens a second", lambda run: run["tokens_per_second"], more_is_worse=False),
}


@dataclass(frozen=True, slots=True)
class Study:
    """Attributes:
    arms: by the number they differ in, else as they ended; of each all finished runs.
    left: who did not finish, and why.
    against: the arm that the others are compared with.
    swept: see `swept_over`.
    """

    name: str
    arms: list[Arm]
    left: list[str]
    against: Arm
    kinds: list[str]
    swept: str | None

    def differences(self, kind: str) -> dict[str, Difference | str]:
        """By arm, its difference from ``against``; or why there is none."""
        found: dict[str, Difference | str] = {}
        for arm in self.arms:
            if arm is self.against:
                continue
            try:
                ours, theirs = ({s: each.scores(s, kind) for s in each.runs} for each in (arm, self.against))
                found[arm.name] = difference(ours, theirs)
            except (ValueError, OSError) as error:
                found[arm.name] = str(error)
        return found

    def adjusted(self, kind: str) -> dict[str, float]:
        """By arm, the p-value of its difference, corrected by Holm for there being several arms."""
        ps = {name: found.p for name, found in self.differences(kind).items() if isinstance(found, Difference)}
        return dict(zip(ps, holm(list(ps.values())), strict=True))


def read_study(folders: Sequence[Path], against: str | None = None) -> Study:
    """A sweep's folder, or one or several runs'.

    Raises:
        ValueError: there is no finished run, or no arm of the name ``against``.
    """
    found = list(_runs(folders))
    done = [(folder, run) for folder, run in found if state(run) == "finished"]
    left = [f"{state(run)}: {run['name']}: {reason(run)}" for _, run in found if state(run) != "finished"]
    if not done:
        raise ValueError(
            f"no finished run in {', '.join(map(relative, folders))}{': ' if left else ''}{'; '.join(left)}. Give a "
            "sweep's folder, or that of a run that python train.py finished."
        )
    words = [_words(run) for _, run in done]
    same = set.intersection(*(set(w.items()) for w in words)) if len(words) > 1 else set(words[0].items())
    arms: dict[str, Arm] = {}
    for (folder, run), typed in zip(done, words, strict=True):
        own = {key: value for key, value in typed.items() if (key, value) not in same and key != "seed"}
        if len(own) > 1:  # a first stage for each arm follows from what the arm is
            own.pop("init_from", None)
        name = ",".join(f"{key}={value}" for key, value in own.items()) or run["plan"]["name"]
        if run["seed"] in arms.get(name, Arm(name, own)).runs:
            name = run["name"]  # another run that was typed alike
        arm = arms.setdefault(name, Arm(name, own))
        arm.runs[run["seed"]], arm.folders[run["seed"]] = run, folder
    ordered = list(arms.values())
    answered = [set(run["metrics"]) for _, run in done]
    kinds = sorted(set.intersection(*answered))
    left += [f"not compared: {kind}, which not every run was asked" for kind in sorted(set.union(*answered) - {*kinds})]
    if not kinds:
        raise ValueError("nothing to compare: no kind of facts was asked of every run. Give runs of one evaluation.")
    swept = swept_over(ordered)
    if swept is not None:
        ordered.sort(key=lambda arm: float(arm.words[swept]))
    return Study(_name(folders), ordered, left, _against(ordered, against), kinds, swept)


def swept_over(arms: Sequence[Arm]) -> str | None:
    """The one key that arms differ in, if their values are numbers."""
    keys = {key for arm in arms for key in arm.words}
    if len(keys) != 1 or len(arms) < 2:
        return None
    (key,) = keys
    try:
        [float(arm.words[key]) for arm in arms]
    except ValueError:
        return None
    return key


def _runs(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in folders:
        run = read_results(folder)
        if run:
            yield folder, {"name": relative(folder), **run}
            continue
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder.")
        for arm in read_arms(folder):
            yield folder / arm["name"], arm


def _words(run: dict[str, Any]) -> dict[str, str]:
    """What was typed for a run, by key; of one outside a sweep its plan's name."""
    pairs = (word.lstrip("+").partition("=") for word in run.get("arm") or [f"model={run['plan']['name']}"])
    return {key: value for key, _, value in pairs}


def _against(arms: list[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        return next((arm for arm in arms if arm.one["plan"]["name"] == "baseline"), arms[0])
    for arm in arms:
        if wanted in (arm.name, *arm.words.values()):
            return arm
    raise ValueError(f"--against {wanted}: no finished arm of that name. There are {', '.join(a.name for a in arms)}.")


def _name(folders: Sequence[Path]) -> str:
    return ", ".join(folder.resolve().name for folder in folders)


def _mean(values: Any) -> float:
    each = list(values)
    return sum(each) / len(each)
