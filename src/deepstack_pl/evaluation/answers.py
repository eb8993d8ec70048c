"""Scores of answers, as each benchmark's official scorer gives them, as torchmetrics."""

from abc import abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from deepstack_pl.evaluation.metrics import clustered_interval, interval_name
from deepstack_pl.evaluation.task import Question

ALL = "all"  # every sample, of whatever kind


class AnswerMetric(Metric):
    """The mean of ``score`` over samples, of each kind and of all.

    State: rows of (kind, picture, score); distributed runs gather them. Questions about one picture are not
    independent: intervals are clustered by picture, as `metrics.clustered_interval` says.

    Attributes:
        headline: what the mean is called in results.
    """

    headline: ClassVar[str]
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < confidence < 1:
            raise ValueError(
                f"evaluation.confidence={confidence} is a share: use a value between 0 and 1, such as 0.95."
            )
        self.confidence = confidence
        self.kinds: dict[int, str] = {}
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, question: Question, prediction: str) -> float:
        """How right ``prediction`` is: 0 to 1."""

    def update(self, question: Question, prediction: str) -> None:
        """Count one answer."""
        kind, picture = _number(question.kind), _number(question.image)
        self.kinds[kind] = question.kind
        row = (kind, picture, self.score(question, prediction))
        self.rows.append(torch.tensor([row], dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, dict[str, Any]]:
        """By kind, and under "all": the mean with its interval, and how many samples."""
        table = dim_zero_cat(self.rows)
        parts = {ALL: table}
        if len(self.kinds) > 1:
            parts |= {name: table[table[:, 0] == number] for number, name in sorted(self.kinds.items(), key=_by_name)}
        return {kind: self.summary(part[:, 1], part[:, 2]) for kind, part in parts.items()}

    def summary(self, pictures: Tensor, scores: Tensor) -> dict[str, Any]:
        """Of the samples with these pictures and scores (each ``n``)."""
        _, cluster = pictures.unique(return_inverse=True)
        clusters = int(cluster.max()) + 1
        right = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster.cpu(), scores.cpu())
        counts = torch.bincount(cluster.cpu(), minlength=clusters)
        return {
            self.headline: float(scores.mean()),
            interval_name(self.confidence): list(clustered_interval(right.tolist(), counts.tolist(), self.confidence)),
            "samples": len(scores),
            "pictures": clusters,
        }


def _number(text: str) -> int:
    """A number that stands for ``text`` on every process, exact as a float."""
    return int.from_bytes(sha256(text.encode()).digest()[:6], "big")


def _by_name(item: tuple[int, str]) -> str:
    return item[1]


class ExactMatch(AnswerMetric):
    """Placeholder to be completed: see GQA."""

    headline = "exact_match"

    def score(self, question: Question, prediction: str) -> float:
        return float(any(prediction.strip().lower() == answer.strip().lower() for answer in question.answers))


METRICS: Sequence[type[AnswerMetric]] = (ExactMatch,)
