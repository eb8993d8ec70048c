"""How sure one can be of a share of samples. Loads without torch.

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
