"""Vision width to language width; one projector for the global view and every group, applied before dealing."""

from torch import nn

from deepstack_pl.multimodal.config import ProjectorKind


def build_projector(kind: ProjectorKind, vision_width: int, language_width: int) -> nn.Module:
    """A linear map, or LLaVA-1.5's two-layer MLP with exact GELU."""
    if kind is ProjectorKind.linear:
        return nn.Linear(vision_width, language_width)
    return nn.Sequential(nn.Linear(vision_width, language_width), nn.GELU(), nn.Linear(language_width, language_width))
