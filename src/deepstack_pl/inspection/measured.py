"""Two tensors that should be equal: how far apart they are, where, and whether that is within a bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor


class Quantity(Enum):
    """What is compared; the value is its name for people."""

    grids = "grids"
    views = "views"
    layer_inputs = "layer inputs"
    logits = "logits"
    loss = "loss"
    gradients = "gradients"
    greedy = "greedy"
    unknown = "unknown"  # stored, but nothing knows how to compare it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One stored tensor, compared.

    Attributes:
        name: its key in the file (``layer_input.3``).
        part: of a gradient, the part of the model it belongs to.
        largest: the largest difference; NaN where there is one, or where nothing could be compared.
        bound: what is allowed where the difference is largest against what is allowed.
        share: that largest difference as a share of what is allowed; infinite for a NaN.
        count: how many numbers were compared.
        reason: what is wrong: the place of the worst number, or why nothing could be compared.
    """

    quantity: Quantity
    name: str
    part: str = ""
    largest: float
    bound: float
    share: float
    count: int
    ok: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; JSON knows neither NaN nor infinity."""
        numbers = {"largest": self.largest, "bound": self.bound, "share": self.share}
        finite = {name: value if isfinite(value) else None for name, value in numbers.items()}
        head = {"quantity": self.quantity.value, "name": self.name, "part": self.part}
        return {**head, **finite, "count": self.count, "ok": self.ok, "reason": self.reason}


def measure(
    quantity: Quantity,
    name: str,
    ours: Tensor,
    stored: Tensor,
    bound: float | Tensor,
    axes: Sequence[str],
    *,
    valid: Tensor | None = None,
    part: str = "",
) -> Measured:
    """Compare ``ours`` with ``stored``; ``valid`` masks the leading axes, ``bound`` may be one for each number.

    A NaN on either side is no agreement, also where both have one.
    """
    if ours.shape != stored.shape:
        reason = f"its shape is {list(ours.shape)}, stored is {list(stored.shape)}"
        return refused(quantity, name, reason, part=part)
    ours = ours.detach()
    apart = (ours.double() - stored.double()).abs()
    allowed = torch.as_tensor(bound, dtype=torch.double).expand_as(apart)
    keep = torch.ones_like(apart, dtype=torch.bool)
    if valid is not None:
        keep = valid.reshape(*valid.shape, *[1] * (apart.ndim - valid.ndim)).expand_as(apart)
    count = int(keep.sum())
    if not count:
        return refused(quantity, name, "there is nothing in it to compare", part=part)
    apart = apart.masked_fill(~keep, 0)
    shares = (apart / allowed).nan_to_num(nan=inf, posinf=inf)
    worst = int(shares.argmax())
    share = float(shares.flatten()[worst])
    place = ", ".join(
        f"{axis} {int(at)}"
        for axis, at in zip(axes, torch.unravel_index(torch.tensor(worst), apart.shape), strict=True)
    )
    here, there = float(ours.flatten()[worst]), float(stored.flatten()[worst])
    ok = share <= 1
    return Measured(
        quantity=quantity,
        name=name,
        part=part,
        largest=float(apart.max()),
        bound=float(allowed.flatten()[worst]),
        share=share,
        count=count,
        ok=ok,
        reason="" if ok else f"{here:.7g}, stored is {there:.7g}" + (f" at {place}" if place else ""),
    )


def same(quantity: Quantity, name: str, ours: Sequence[Any], stored: Sequence[Any]) -> Measured:
    """Compare exactly; the difference is how many entries differ."""
    longest = max(len(ours), len(stored))
    wrong = sum(a != b for a, b in zip(ours, stored, strict=False)) + abs(len(ours) - len(stored))
    return Measured(
        quantity=quantity,
        name=name,
        largest=wrong,
        bound=0,
        share=inf if wrong else 0,
        count=longest,
        ok=not wrong,
        reason=f"{list(ours)}, stored is {list(stored)}" if wrong else "",
    )


def refused(quantity: Quantity, name: str, reason: str, *, part: str = "") -> Measured:
    """Something stored that nothing of ours could be compared with."""
    return Measured(
        quantity=quantity, name=name, part=part, largest=nan, bound=nan, share=inf, count=0, ok=False, reason=reason
    )
