"""Two arms on the same samples: their difference, an interval and a p-value, by a paired bootstrap. Numpy alone.

The samples, and where there are several the seeds, are drawn anew with replacement, each draw the same for both arms,
so that what is hard for both counts for neither (B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993,
8.3 and 15.4). Samples and seeds cross: every seed answers the same samples, and a draw takes some seeds and some
samples. With few seeds (three) the interval is too narrow rather than too wide; with one it is of the samples alone:
what another seed would have done is not in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from deepstack_pl.evaluation.intervals import wilson_interval

Scores = Mapping[str, tuple[float, int]]  # of a run, by sample: how much is right, of how much
_CHUNK = 1 << 22  # numbers drawn at once
_FEW = 14  # samples, whose signs are counted out


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of one arm minus that of another.

    Attributes:
        p: how often a draw lies as far from ``delta`` as zero does: two-sided.
        flipped: facts that one arm has right and the other wrong, at least: summed over samples and seeds.
    """

    delta: float
    low: float
    high: float
    p: float
    samples: int
    seeds: int
    flipped: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(
    ours: Mapping[int, Scores], theirs: Mapping[int, Scores], *, confidence: float = 0.95, draws: int = 10_000
) -> Difference:
    """Compare two arms by seed. Equal arguments give equal results.

    Raises:
        ValueError: seeds or samples are not the same, so that nothing is paired.
    """
    seeds = sorted(ours)
    if seeds != sorted(theirs):
        raise ValueError(f"not paired: one arm has seeds {seeds}, the other {sorted(theirs)}.")
    keys = sorted(ours[seeds[0]])
    for arm in (ours, theirs):
        for seed in seeds:
            if sorted(arm[seed]) != keys:
                raise ValueError(f"not paired: with seed {seed} an arm has answered other samples.")
    facts = np.array([ours[seeds[0]][key][1] for key in keys], dtype=float)
    apart = np.array([[ours[s][key][0] - theirs[s][key][0] for key in keys] for s in seeds], dtype=float)
    found, drawn = bootstrap(apart, facts, draws)
    low, high = (float(each) for each in np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    if low == high and found and len(keys) <= _FEW:  # all say the same, and so do all draws; but they are few
        least = wilson_interval(len(keys), len(keys), confidence)[0] * found
        low, high = min(low, least), max(high, least)
    as_far = int((np.abs(drawn - found) >= abs(found) - 1e-12).sum())
    return Difference(
        delta=found,
        low=low,
        high=high,
        p=max((1 + as_far) / (1 + draws), _by_signs(apart.mean(0))),
        samples=len(keys),
        seeds=len(seeds),
        flipped=int(np.abs(apart).sum()),
    )


def _by_signs(apart: Float[ndarray, " n"]) -> float:
    """The exact p-value of a few samples: how many ways of giving their differences a sign lie as far from zero (R. A.
    Fisher, "The Design of Experiments", 1935, 21). Draws with replacement of two samples that agree all agree. Of many
    samples the bootstrap's is as good: 0.
    """
    if len(apart) > _FEW:
        return 0.0
    signs = 1 - 2 * (np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart)) & 1)
    return float((np.abs(signs @ apart) >= abs(apart.sum()) - 1e-12).mean())


def interval(scores: Mapping[int, Scores], *, confidence: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """Of one arm's accuracy over several seeds. A single seed's is `intervals.clustered_interval`, which does not
    shrink to a point where all is right.
    """
    seeds = sorted(scores)
    keys = sorted(scores[seeds[0]])
    facts = np.array([scores[seeds[0]][key][1] for key in keys], dtype=float)
    right = np.array([[scores[seed][key][0] for key in keys] for seed in seeds], dtype=float)
    _, drawn = bootstrap(right, facts, draws)
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap(
    values: Float[ndarray, "s n"], facts: Float[ndarray, " n"], draws: int
) -> tuple[float, Float[ndarray, " b"]]:
    """Values per fact, over ``s`` seeds and ``n`` samples; and the same of ``draws`` draws of both."""
    seeds, samples = values.shape
    generator = np.random.default_rng(0)
    found: list[np.ndarray] = []
    left = draws
    while left:
        count = min(left, max(1, _CHUNK // samples))
        of_samples = generator.multinomial(samples, np.full(samples, 1 / samples), size=count)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        found.append(((of_seeds @ values) * of_samples).sum(1) / (of_samples @ facts))
        left -= count
    return float(values.sum() / seeds / facts.sum()), np.concatenate(found)


def holm(ps: Sequence[float]) -> list[float]:
    """P-values of several comparisons, each as large as S. Holm's step-down asks (Scand. J. Stat. 6, 1979)."""
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        most = max(most, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = most
    return adjusted
