"""Towers of a convolution, learned positions and blocks, as transformers and timm build them, under one set of names.

What no feature needs (final norms, poolers, heads, mask tokens) is not kept. Axes: as in `towers_face`; ``p`` prefix
tokens, ``n`` learned positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.towers_face import Tower, take


@dataclass
class Parts:
    """What is kept of a library's model.

    Attributes:
        patches: the convolution.
        prefix_tokens: class token and registers.
        positions: those beyond a view's patches stand in front and belong to the first prefix tokens.
        norm: what follows the embeddings.
        blocks: the blocks.
    """

    patches: nn.Conv2d
    prefix_tokens: list[Tensor]
    positions: Tensor
    norm: nn.Module
    blocks: Iterable[nn.Module]

    def prefix_table(self) -> Float[Tensor, "p d"] | None:
        return torch.cat([t.detach().view(-1, t.shape[-1]) for t in self.prefix_tokens]) if self.prefix_tokens else None

    def position_table(self) -> Float[Tensor, "n d"]:
        return self.positions.detach().flatten(0, -2)


class PlainTower(Tower):
    """A tower made of `Parts`."""

    def __init__(self, config: VisionConfig, parts: Parts) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = parts.patches
        self.position_embedding = nn.Parameter(parts.position_table())
        self.norm = parts.norm
        self.blocks = nn.ModuleList(parts.blocks)
        tokens = parts.prefix_table()
        self.prefix = 0 if tokens is None else len(tokens)
        self.prefix_tokens = None if tokens is None else nn.Parameter(tokens)
        self.placed = len(self.position_embedding) - config.patches_per_side**2  # prefix tokens with positions
        assert 0 <= self.placed <= self.prefix

    def patches(self, pixels: Float[Tensor, "v 3 y x"]) -> Float[Tensor, "v h w d"]:
        return rearrange(self.patch_embedding(pixels), "v d h w -> v h w d")

    def positions(self) -> Float[Tensor, "p2 d"]:
        return self.position_embedding[self.placed :]

    def finish(self, tokens: Float[Tensor, "v n d"]) -> Float[Tensor, "v t d"]:
        if self.prefix_tokens is None:
            return self.norm(tokens)
        first, places = (part.to(tokens.dtype) for part in (self.prefix_tokens, self.position_embedding))
        first = torch.cat([first[: self.placed] + places[: self.placed], first[self.placed :]])
        return self.norm(torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def unreachable(self) -> list[str]:
        """Blocks after the tapped layer; prefix tokens where no block runs."""
        blocks = [f"blocks.{i}" for i in range(self.config.tap, self.config.layers)]
        return self._under(blocks if self.config.tap else ["prefix_tokens", *blocks])

    def take_parts(self, parts: Parts, source: str) -> None:
        """Copy the weights of ``parts``, whole.

        Raises:
            ValueError: they are of another architecture.
        """
        modules = {"patch_embedding": parts.patches, "norm": parts.norm, "blocks": nn.ModuleList(parts.blocks)}
        loaded = dict(nn.ModuleDict(modules).state_dict()) | {"position_embedding": parts.position_table()}
        tokens = parts.prefix_table()
        take(self, self.config, source, loaded if tokens is None else loaded | {"prefix_tokens": tokens})
