"""Vision width to language width, applied before dealing.

Axes: ``k`` views, ``n`` tokens of a view, ``v d`` widths of vision and language.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepstack_pl.multimodal.config import ProjectorKind, Sharing


class TwoProjectors(nn.Module):
    """One projector for global views and one for all other views (the published code's ``twoviews_unshare``, which
    crashes there).
    """

    def __init__(self, kind: ProjectorKind, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.global_view = _projector(kind, vision_width, language_width)
        self.tiles = _projector(kind, vision_width, language_width)

    def forward(self, tokens: Float[Tensor, "k n v"], images: int) -> Float[Tensor, "k n d"]:
        """The first ``images`` views are global."""
        return torch.cat([self.global_view(tokens[:images]), self.tiles(tokens[images:])])


def build_projector(kind: ProjectorKind, sharing: Sharing, vision_width: int, language_width: int) -> nn.Module:
    """One projector, or two."""
    if sharing is Sharing.global_and_tiles:
        return TwoProjectors(kind, vision_width, language_width)
    return _projector(kind, vision_width, language_width)


def _projector(kind: ProjectorKind, vision_width: int, language_width: int) -> nn.Module:
    """A linear map, or LLaVA-1.5's two-layer MLP with exact GELU."""
    if kind is ProjectorKind.linear:
        return nn.Linear(vision_width, language_width)
    return nn.Sequential(nn.Linear(vision_width, language_width), nn.GELU(), nn.Linear(language_width, language_width))
