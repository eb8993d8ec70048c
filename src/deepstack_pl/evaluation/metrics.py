"""Accuracy over facts, exact match over answers, and how sure one can be of either.

How sure one can be is `intervals`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from deepstack_pl.evaluation.intervals import clustered_interval, interval_name, wilson_interval


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
