"""Vision width to language width, applied before dealing.

Axes: ``k`` views, ``n`` tokens of a view, ``q`` the squares of them that become one each, ``v d`` widths of vision and
language.
"""

from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from deepstack_pl.multimodal.config import ProjectorKind, Sharing
from deepstack_pl.stacking.config import Dealt, Host, Sequence, Source
from deepstack_pl.stacking.plan import Plan


class TwoProjectors(nn.Module):
    """One projector for global views and one for all other views (the published code's ``twoviews_unshare``, which
    crashes there).
    """

    def __init__(self, kind: ProjectorKind, vision_width: int, language_width: int, square: int) -> None:
        super().__init__()
        self.global_view = _projector(kind, vision_width, language_width, square)
        self.tiles = _projector(kind, vision_width, language_width, square)

    def forward(self, tokens: Float[Tensor, "k n v"], images: int) -> Float[Tensor, "k q d"]:
        """The first ``images`` views are global."""
        return torch.cat([self.global_view(tokens[:images]), self.tiles(tokens[images:])])


class PatchMerger(nn.Module):
    """Qwen3-VL's: a layer norm, squares of tokens side by side in the channels, two layers with exact GELU.

    For the text sequence the norm is over single tokens, for a tap over the joined ones (``norm_joined``), as there.
    """

    def __init__(self, vision_width: int, language_width: int, square: int, *, norm_joined: bool) -> None:
        super().__init__()
        joined = vision_width * square**2
        self.square, self.norm_joined = square, norm_joined
        self.norm = nn.LayerNorm(joined if norm_joined else vision_width, eps=1e-6)
        self.linear_fc1 = nn.Linear(joined, joined)
        self.linear_fc2 = nn.Linear(joined, language_width)

    def forward(self, tokens: Float[Tensor, "k n v"]) -> Float[Tensor, "k q d"]:
        joined = self.norm(join(tokens, self.square)) if self.norm_joined else join(self.norm(tokens), self.square)
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(joined)))


class PixelShuffle(nn.Sequential):
    """Squares of tokens side by side in the channels, then LLaVA-1.5's two layers."""

    def __init__(self, vision_width: int, language_width: int, square: int) -> None:
        joined = nn.Linear(vision_width * square**2, language_width)
        super().__init__(joined, nn.GELU(), nn.Linear(language_width, language_width))
        self.square = square

    def forward(self, input: Float[Tensor, "k n v"]) -> Float[Tensor, "k q d"]:  # a Sequential's own word for it
        return super().forward(join(input, self.square))


def join(tokens: Float[Tensor, "k n v"], square: int) -> Float[Tensor, "k q joined"]:
    """Squares of ``square`` x ``square`` tokens as one, row by row in the channels."""
    side = isqrt(tokens.shape[1])
    return rearrange(tokens, "k (h a w b) v -> k (h w) (a b v)", h=side // square, a=square, b=square)


def pick(tokens: Float[Tensor, "k n v"], square: int, place: int) -> Float[Tensor, "k q v"]:
    """Of every square the token at ``place``, counted row by row: a spatial group."""
    side, (row, column) = isqrt(tokens.shape[1]), divmod(place, square)
    squares = rearrange(tokens, "k (h a w b) v -> k (h w) a b v", h=side // square, a=square, b=square)
    return squares[:, :, row, column]


def pool(tokens: Float[Tensor, "k n d"], square: int) -> Float[Tensor, "k q d"]:
    """Squares of ``square`` x ``square`` tokens averaged."""
    if square == 1:
        return tokens
    side = isqrt(tokens.shape[1])
    return rearrange(tokens, "k (h a w b) d -> k (h w) (a b) d", h=side // square, a=square, b=square).mean(2)


def build_projector(
    plan: Plan, kind: ProjectorKind, sharing: Sharing, vision_width: int, language_width: int
) -> nn.Module | None:
    """The projector of the text sequence and of every group without its own; None where the plan reads neither."""
    shared = [dealt for dealt in plan.groups(Host.llm) if not owns_projector(dealt, sharing)]
    if plan.sequence is Sequence.blank and not shared:
        return None
    if sharing is Sharing.global_and_tiles:
        return TwoProjectors(kind, vision_width, language_width, plan.pooling)
    return _projector(kind, vision_width, language_width, plan.pooling)


def build_own_projectors(
    plan: Plan, kind: ProjectorKind, sharing: Sharing, vision_width: int, language_width: int
) -> nn.ModuleDict:
    """A projector for each group that has its own, by `own_name`. A spatial group's tokens are single: none to join."""
    return nn.ModuleDict(
        {
            own_name(dealt): _projector(
                kind,
                vision_width,
                language_width,
                1 if dealt[0] is Source.spatial else plan.pooling,
                norm_joined=dealt[0] is Source.tap,
            )
            for dealt in plan.groups(Host.llm)
            if owns_projector(dealt, sharing)
        }
    )


def owns_projector(dealt: Dealt, sharing: Sharing) -> bool:
    """Whether a group has a projector of its own: a tap reads another depth than the text sequence does, always."""
    return sharing is Sharing.per_injection or dealt[0] is Source.tap


def own_name(dealt: Dealt) -> str:
    """The name of a group's own projector."""
    return f"{dealt[0].value}_{dealt[1]}"


def _projector(
    kind: ProjectorKind, vision_width: int, language_width: int, square: int, *, norm_joined: bool = False
) -> nn.Module:
    match kind:
        case ProjectorKind.linear:
            return nn.Linear(vision_width, language_width)
        case ProjectorKind.mlp2x_gelu:
            wide = nn.Linear(vision_width, language_width)
            return nn.Sequential(wide, nn.GELU(), nn.Linear(language_width, language_width))
        case ProjectorKind.pixel_shuffle:
            return PixelShuffle(vision_width, language_width, square)
        case ProjectorKind.patch_merger:
            return PatchMerger(vision_width, language_width, square, norm_joined=norm_joined)
