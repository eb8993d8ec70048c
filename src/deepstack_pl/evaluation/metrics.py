"""Accuracy over facts, exact match over answers, and how sure one can be of either.

The facts of a page are not independent: a model that reads one glyph of a page wrongly tends to read its neighbours
wrongly too. The interval of the accuracy is therefore Wilson's with an effective sample size (Franco, Little, Louis,
Slud, "Comparative study of confidence intervals for proportions in complex sample surveys", J. Surv. Stat. Methodol. 7,
2019): as many independent facts as would vary like the clustered ones (ratio estimator over samples). Unlike a
bootstrap or a normal interval it does not shrink to a point at 0 or 1. Where nothing varies (all right or all wrong)
the clustering cannot be estimated, and each sample counts as one fact.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class FactAccuracy(Metric):
    """Right facts and right answers, by kind.

    State: one row a sample, ``(kind, right facts, facts, whole answer right)``; distributed runs gather the rows.
    """

    rows: list[Tensor]
    full_state_update = False

    def __init__(self, kinds: Sequence[str], confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < confidence < 1:
            raise ValueError(
                f"evaluation.confidence={confidence} is a share: use a value between 0 and 1, such as 0.95."
            )
        self.kinds = list(kinds)
        self.confidence = confidence
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, kind: str, correct: Sequence[bool], exact: bool) -> None:
        """Count one sample: which of its facts are right, and whether its whole answer is."""
        if kind not in self.kinds:
            raise ValueError(f"a sample of kind {kind!r}, but the metric was made for {self.kinds}.")
        if not correct:
            raise ValueError(f"a sample of kind {kind!r} without a single fact: there is nothing to score.")
        row = (self.kinds.index(kind), sum(correct), len(correct), int(exact))
        self.rows.append(torch.tensor([row], dtype=torch.long, device=self.device))

    def compute(self) -> dict[str, dict[str, Any]]:
        """For each kind: accuracy and exact match with their intervals, facts and samples."""
        table: Int[Tensor, "n 4"] = dim_zero_cat(self.rows) if len(self.rows) else torch.empty(0, 4, dtype=torch.long)
        return {
            kind: self._of_kind(table[table[:, 0] == number, 1:])
            for number, kind in enumerate(self.kinds)
            if bool((table[:, 0] == number).any())
        }

    def _of_kind(self, table: Int[Tensor, "n 3"]) -> dict[str, Any]:
        right, facts, exact = (column.tolist() for column in table.T)
        interval = interval_name(self.confidence)
        return {
            "accuracy": sum(right) / sum(facts),
            interval: list(clustered_interval(right, facts, self.confidence)),
            "exact_match": sum(exact) / len(exact),
            f"exact_match_{interval}": list(wilson_interval(sum(exact), len(exact), self.confidence)),
            "facts": sum(facts),
            "samples": len(facts),
        }


def score(prediction: str, facts: Sequence[str]) -> list[bool]:
    """Which ``facts`` the prediction states: word by word in order where there are several, else as a whole.

    Raises:
        ValueError: no facts, or one of several is not a single word, so that words cannot be matched by position.
    """
    if not facts:
        raise ValueError("no facts to score: give the whole answer where nothing finer is known.")
    if len(facts) == 1:
        return [prediction.strip() == facts[0].strip()]
    for fact in facts:
        if len(fact.split()) != 1:
            raise ValueError(f"fact {fact!r} is one of {len(facts)}, which are scored word by word: make it one word.")
    words = prediction.split()
    return [place < len(words) and words[place] == fact for place, fact in enumerate(facts)]


def interval_name(confidence: float) -> str:
    """What an interval is called in results: ``ci95``."""
    return f"ci{100 * confidence:g}"


def wilson_interval(successes: float, trials: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927); ``trials`` may be an effective number."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if share == 0 else max(0.0, (centre - spread) / scale)  # exactly, whatever rounding says
    high = 1.0 if share == 1 else min(1.0, (centre + spread) / scale)
    return low, high


def clustered_interval(right: Sequence[float], facts: Sequence[int], confidence: float) -> tuple[float, float]:
    """Wilson's interval for ``sum(right) / sum(facts)`` over samples that hold several facts each."""
    total = sum(facts)
    share = sum(right) / total
    trials = effective_facts(right, facts)
    return wilson_interval(share * trials, trials, confidence)


def effective_facts(right: Sequence[float], facts: Sequence[int]) -> float:
    """As many independent facts as vary like these, and never more than there are."""
    samples, total = len(facts), sum(facts)
    share = sum(right) / total
    variance = 0.0
    if samples > 1:
        residuals = sum((r - share * n) ** 2 for r, n in zip(right, facts, strict=True))
        variance = samples / (samples - 1) * residuals / total**2
    if share in (0.0, 1.0) or samples == 1:
        return samples
    return total if variance == 0 else min(float(total), max(1.0, share * (1 - share) / variance))
