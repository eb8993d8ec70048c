"""The one gather-mask-add. Pure functions of explicit arguments; no state, no loop over samples, no ``nonzero``.

Axes: ``n`` rows, ``d`` width; ``...`` any positions.
"""

from collections import UserList
from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deepstack_pl.stacking.config import Operator
from deepstack_pl.stacking.plan import Injection

NOTHING = -1  # a row that is none: zero
NEWLINE = -2  # a row that is the learned newline
_CHIRP = (40503, 65537)  # turns of a channel's square; whole numbers, so that every device finds the same angles


@dataclass(frozen=True, slots=True)
class InjectionTrace:
    """What one injection did in one forward pass, for receipts and pictures.

    Attributes:
        added: what was added to the residual stream; keeps its gradient after a backward pass.
        touched: the positions at which the stream changed.
        hidden_rms, added_rms: root mean square of the stream before, and of the addition, over touched positions.
        cosine: between the stream before and the addition, the mean over touched positions.
    """

    injection: Injection
    added: Float[Tensor, "... d"]
    touched: Bool[Tensor, "..."]
    hidden_rms: Float[Tensor, ""]
    added_rms: Float[Tensor, ""]
    cosine: Float[Tensor, ""]


class Traces(UserList[InjectionTrace]):
    """What a forward pass writes its traces into. No list: whoever copies lists on their way to a layer, as FSDP does,
    would have the layer write into the copy.
    """


def gather(features: Float[Tensor, "n d"], rows: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
    """``features[rows]``, zero where a row is -1; zero there in the gradient too, never absent."""
    return features[rows.clamp_min(0)] * (rows >= 0).unsqueeze(-1)


def fill(
    features: Float[Tensor, "n d"], newline: Float[Tensor, " d"] | None, rows: Int[Tensor, "..."]
) -> Float[Tensor, "... d"]:
    """`gather`, with ``newline`` where a row asks for it; a plan without newlines has none."""
    filled = gather(features, rows)
    if newline is None:
        return filled
    return filled + newline.to(filled.dtype) * (rows == NEWLINE).unsqueeze(-1)


def inject(
    hidden: Float[Tensor, "... d"],
    features: Float[Tensor, "n d"],
    rows: Int[Tensor, "..."],
    injection: Injection,
    scale: Float[Tensor, ""] | None,
    traces: Traces | None,
) -> Float[Tensor, "... d"]:
    """``hidden`` plus the features at ``rows`` (-1: nothing), in ``hidden``'s dtype and on its device, out of place.

    ``scale`` multiplies the addition where the injection is gated; of features that are noise their size alone is added
    (`noise_like`); ``traces``, where given, receives the record.
    """
    here = hidden.device  # layers may be spread over devices; to a tensor that is there already this does nothing
    added = gather(features.to(here), rows.to(here))
    if injection.operator is Operator.noise:
        added = noise_like(added)
    if scale is not None:
        added = added * scale.to(here)
    added = added.to(hidden.dtype)
    after = hidden + added
    if traces is not None:
        traces.append(_trace(injection, hidden, added, after))
    return after


def noise_like(tokens: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """One direction, the same for all, as strong as each token. A chirp: no random numbers, equal on every device."""
    factor, modulus = _CHIRP
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    direction = torch.sin((places * places * factor % modulus).float() * (2 * pi / modulus))
    direction = direction / direction.square().mean().sqrt()
    sizes = tokens.float().square().mean(-1, keepdim=True)
    sizes = torch.where(sizes > 0, sizes, 1).sqrt() * (sizes > 0)  # the root's slope at nothing is infinite
    return (sizes * direction).to(tokens.dtype)


def _trace(injection: Injection, before: Tensor, added: Tensor, after: Tensor) -> InjectionTrace:
    if added.requires_grad:
        added.retain_grad()
    touched = (after != before).any(-1)
    count = touched.sum().clamp_min(1) * before.shape[-1]

    def rms(values: Tensor) -> Tensor:
        return ((values.detach().float() ** 2 * touched.unsqueeze(-1)).sum() / count).sqrt()

    alike = F.cosine_similarity(before.detach().float(), added.detach().float(), dim=-1)
    cosine = (alike * touched).sum() / touched.sum().clamp_min(1)
    return InjectionTrace(injection, added, touched, rms(before), rms(added), cosine)
