"""Features of the tower to what stands in the text and what is injected under it.

Projected before dealing, as published; where groups stand side by side in the channels, dealt first and projected
together. Axes: ``k`` views, ``p2`` tokens of a view, ``n`` slots, ``g`` groups, ``v d`` widths of tower and LLM.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepstack_pl.multimodal.config import JOINING, ProjectorKind
from deepstack_pl.multimodal.projector import TwoProjectors, own_name, pick, pool
from deepstack_pl.stacking.config import Dealt, Host, Sequence, Source
from deepstack_pl.stacking.injection import fill
from deepstack_pl.stacking.plan import Plan


def text_and_groups(
    plan: Plan,
    kind: ProjectorKind,
    projectors: tuple[nn.Module | None, nn.ModuleDict],
    newline: Float[Tensor, " d"] | None,
    features: list[Float[Tensor, "k p2 v"]],
    images: int,
    rows: tuple[Int[Tensor, " n"], Int[Tensor, "g n"]],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "_ n d"]]:
    """The visual tokens of the text sequence, and those of each group that enters the LLM, slot by slot.

    Args:
        projectors: the shared one (None where nothing reads it), and those of groups that have their own.
        features: the selected feature, then the plan's taps; the first ``images`` views of each are global.
        rows: which token stands at each slot, of the sequence and of each group.
    """
    shared, own = projectors
    feature, *taps = features
    in_text, in_groups = rows
    if plan.sequence is Sequence.channels:
        dealt = fill(feature.flatten(0, 1), newline, torch.cat([in_text[None], in_groups]))
        assert shared is not None
        together = shared(torch.cat([*dealt], dim=-1))
        return together, together.new_empty(0, *together.shape)  # nothing is left to inject
    tokens = None if shared is None else _project(shared, feature, images, plan.pooling, kind).flatten(0, 1)

    def group(dealt: Dealt) -> Float[Tensor, "tokens d"]:
        """The tokens that a group's rows name."""
        source, number = dealt
        of = taps[number] if source is Source.tap else feature
        name, square = own_name(dealt), plan.pooling
        if name not in own and source is not Source.spatial:
            assert tokens is not None
            return tokens  # projected already
        project = own[name] if name in own else shared  # noqa: SIM401 - a ModuleDict has no get
        if source is Source.spatial:
            of, square = pick(of, square, number), 1
        assert project is not None
        return _project(project, of, images, square, kind).flatten(0, 1)

    groups = plan.groups(Host.llm)
    if tokens is not None and all(own_name(g) not in own and g[0] is not Source.spatial for g in groups):
        return fill(tokens, newline, in_text), fill(tokens, newline, in_groups)
    dealt = torch.stack([fill(group(g), newline, r) for g, r in zip(groups, in_groups, strict=True)])
    return torch.zeros_like(dealt[0]) if tokens is None else fill(tokens, newline, in_text), dealt


def _project(
    projector: nn.Module, tokens: Float[Tensor, "k n v"], images: int, square: int, kind: ProjectorKind
) -> Float[Tensor, "k q d"]:
    """Through ``projector``; squares are averaged afterwards unless it joined them."""
    projected = projector(tokens, images) if isinstance(projector, TwoProjectors) else projector(tokens)
    return projected if kind in JOINING else pool(projected, square)
