"""What has been trained on, counted: plain numbers that add up over batches, processes and starts."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch
from deepstack_pl.processes import from_all

_WHOLE = 2**63  # the order's sum is kept below: a checkpoint's integers have 64 bits


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of samples, of one process or of all.

    Attributes:
        samples: trained on.
        cut_samples: of these, cut because they were too long.
        cut_positions: positions that went with that.
        cut_answers: samples that kept no label (``llm.too_long=cut`` alone lets them pass).
        refused: not trained on, by `batch.Reason`.
        sources: trained on, by source.
        order: a sum of hashes of (step, key): equal for two runs that took the same steps on the same samples, however
            these were spread over processes and micro-batches.
    """

    samples: int = 0
    cut_samples: int = 0
    cut_positions: int = 0
    cut_answers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    order: int = 0

    @classmethod
    def of(cls, batch: MultimodalBatch, step: int) -> Self:
        """The counts of one micro-batch of optimiser step ``step``; rows that only fill it count nothing."""
        found = cls()
        learned = batch.sample_ids()[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
        labelled = set(learned.unique().tolist())
        for place, (key, source, cut, refused) in enumerate(
            zip(batch.keys, batch.sources, batch.cuts, batch.refused, strict=True)
        ):
            if not key:
                continue
            digest = hashlib.sha256(f"{step} {key} {'' if refused is None else 'refused'}".encode()).digest()
            found.order += int.from_bytes(digest[:8], "big")
            if refused is not None:
                found.refused[refused[0].value] += 1
                continue
            found.samples += 1
            found.sources[source] += 1
            found.cut_samples += bool(cut)
            found.cut_positions += cut
            found.cut_answers += place not in labelled
        found.order %= _WHOLE
        return found

    @property
    def seen(self) -> int:
        """Samples that came, trained on or refused."""
        return self.samples + self.refused.total()

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            samples=self.samples + other.samples,
            cut_samples=self.cut_samples + other.cut_samples,
            cut_positions=self.cut_positions + other.cut_positions,
            cut_answers=self.cut_answers + other.cut_answers,
            refused=self.refused + other.refused,
            sources=self.sources + other.sources,
            order=(self.order + other.order) % _WHOLE,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for checkpoints and reports."""
        return {
            "samples": self.samples,
            "cut_samples": self.cut_samples,
            "cut_positions": self.cut_positions,
            "cut_answers": self.cut_answers,
            "refused": dict(sorted(self.refused.items())),
            "sources": dict(sorted(self.sources.items())),
            "order": self.order,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "refused": Counter(values["refused"]), "sources": Counter(values["sources"])})


def over_all(mine: Tally) -> Tally:
    """The sum over all processes; all must call it."""
    return sum(from_all(mine), Tally())
