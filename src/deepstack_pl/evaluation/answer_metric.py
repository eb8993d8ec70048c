"""What all scores of answers have in common: a mean over samples, by kind, with its interval, as a torchmetric."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from math import fsum
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from deepstack_pl.evaluation.intervals import clustered_interval, interval_name
from deepstack_pl.evaluation.task import Question

ALL = "all"  # every sample, of whatever kind

Rows = Sequence[Sequence[float]]  # each a picture's number, then what `AnswerMetric.values` says


class AnswerMetric(Metric):
    """The mean of ``score`` over samples, of each kind and of all.

    State: rows of (kind, picture, values), and the names of the kinds; distributed runs gather both. Nothing depends on
    the order of updates. Questions about one picture are not independent: intervals are clustered by picture, as
    `intervals.clustered_interval` says.

    Attributes:
        headline: what the mean is called in results.
        columns: how many ``values`` there are.
    """

    headline: ClassVar[str]
    columns: ClassVar[int] = 1
    full_state_update = False
    rows: list[Float64[Tensor, "n c"]]
    names: list[UInt8[Tensor, " letters"]]

    def __init__(self, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < confidence < 1:
            raise ValueError(
                f"evaluation.confidence={confidence} is a share: use a value between 0 and 1, such as 0.95."
            )
        self.confidence = confidence
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        # With each row, so that whatever resets, merges or gathers rows does the same to the names they stand for.
        self.add_state("names", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, question: Question, prediction: str) -> float:
        """How right ``prediction`` is: 0 to 1."""

    def values(self, question: Question, prediction: str) -> tuple[float, ...]:
        """What is counted of one answer, its score first."""
        return (self.score(question, prediction),)

    def update(self, question: Question, prediction: str) -> None:
        """Count one answer."""
        row = (_number(question.kind), _number(question.image), *self.values(question, prediction))
        name = list(question.kind.encode() + b"\0")
        self.rows.append(torch.tensor([row], dtype=torch.float64, device=self.device))
        self.names.append(torch.tensor(name, dtype=torch.uint8, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics does; but it would gather a process without answers as numbers of another type."""
        if isinstance(self.rows, list) and not self.rows:
            self.rows.append(torch.empty(0, 2 + self.columns, dtype=torch.float64, device=self.device))
            self.names.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, dict[str, Any]]:
        """By kind, and under "all": the mean with its interval, and how many samples. Nothing of no answers."""
        if not len(self.rows):
            return {}
        letters = bytes(dim_zero_cat(self.names).tolist())
        names = {_number(name): name for name in letters.decode().split("\0")[:-1]}
        rows = sorted(dim_zero_cat(self.rows).tolist())  # sums of floats depend on their order
        if not rows:
            return {}
        by_kind: dict[str, list[Sequence[float]]] = defaultdict(list)
        for kind, *rest in rows:
            by_kind[names[int(kind)]].append(rest)
        parts = {ALL: sorted(rest for _, *rest in rows)}
        if len(by_kind) > 1:
            parts |= {kind: by_kind[kind] for kind in sorted(by_kind)}
        return {kind: self.summary(part) for kind, part in parts.items()}

    def summary(self, rows: Rows) -> dict[str, Any]:
        """Of the samples of ``rows``."""
        return {self.headline: mean(rows), interval_name(self.confidence): self.interval(rows), **counts(rows)}

    def interval(self, rows: Rows) -> list[float]:
        """The interval of the mean score."""
        scores = by_picture([(row[0], row[1], 1) for row in rows])
        return list(clustered_interval(scores[:, 0].tolist(), scores[:, 1].astype(int).tolist(), self.confidence))


def mean(rows: Rows) -> float:
    """The mean score."""
    return fsum(row[1] for row in rows) / len(rows)


def counts(rows: Rows) -> dict[str, int]:
    """How many samples, over how many pictures."""
    return {"samples": len(rows), "pictures": len({row[0] for row in rows})}


def by_picture(rows: Rows) -> Float64[np.ndarray, "p c"]:
    """The sums over each picture's rows, which start with its number."""
    sums: dict[float, list[Sequence[float]]] = defaultdict(list)
    for picture, *values in rows:
        sums[picture].append(values)
    return np.array([[fsum(column) for column in zip(*each, strict=True)] for each in sums.values()])


def _number(text: str) -> int:
    """A number that stands for ``text`` on every process, exact as a float."""
    return int.from_bytes(sha256(text.encode()).digest()[:6], "big")
