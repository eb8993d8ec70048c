"""Qwen3-VL's vision tower on square views: patches in raster order, every view with an attention of its own.

transformers orders patches in blocks of 2x2 and keeps all images in one sequence. Attention does not know the order:
a patch has its place from learned positions and from the rotation of queries and keys, and both go with it. The mergers
are projectors, and no part of the tower. Axes: as in `towers_face`; ``n`` heads, ``r`` a head's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.towers_face import Tower, refuse_other_values, take
from deepstack_pl.vision.towers_huggingface import build_huggingface, load_huggingface

_THETA = 10000.0
Turn = tuple[Float[Tensor, "p2 r"], Float[Tensor, "p2 r"]]


class Qwen3VLTower(Tower):
    """Qwen3-VL's tower, under transformers' names; it has no prefix tokens."""

    prefix = 0

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        model = build_huggingface(config)
        rope = model.config.to_dict().get("rope_parameters") or {}  # older transformers write the base into the code
        fixed = {
            "layer_norm_eps": (config.layer_norm_eps, model.blocks[0].norm1.eps),
            "rope_theta": (_THETA, rope.get("rope_theta", _THETA)),
            "temporal_patch_size": (2, model.config.temporal_patch_size),
        }
        refuse_other_values(config, "the tower of Qwen3-VL", fixed)
        self.config = config
        self.patch_embed, self.pos_embed, self.blocks = model.patch_embed, model.pos_embed, model.blocks
        for block in self.blocks:
            block.attn = _Attention(block.attn)  # pyright: ignore[reportArgumentType]

    def patches(self, pixels: Float[Tensor, "v 3 y x"]) -> Float[Tensor, "v h w d"]:
        """The still image as both frames of a clip; a convolution without overlap is a matrix."""
        weight, size = self.patch_embed.proj.weight, self.config.patch_size
        frames = weight.shape[2]
        flat = rearrange(pixels, "v c (h p) (w q) -> v h w c (p q)", p=size, q=size)
        flat = repeat(flat, "v h w c pixels -> v h w (c f pixels)", f=frames)
        return F.linear(flat, weight.flatten(1), self.patch_embed.proj.bias)

    def positions(self) -> Float[Tensor, "p2 d"]:
        """The learned grid, brought to a view's: bilinear, corners on corners."""
        side, weight = self.config.patches_per_side, self.pos_embed.weight
        square = rearrange(weight, "(h w) d -> 1 d h w", h=round(len(weight) ** 0.5))
        sized = F.interpolate(square.float(), size=(side, side), mode="bilinear", align_corners=True)
        return rearrange(sized, "1 d h w -> (h w) d").to(weight.dtype)

    def finish(self, tokens: Float[Tensor, "v n d"]) -> Float[Tensor, "v t d"]:
        return tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.proj.weight.dtype

    def embed_together(self, tiles: Float[Tensor, "v 3 s s"], grid: tuple[int, int]) -> Float[Tensor, "i t d"]:
        raise AssertionError("check_one_pass refuses this when the plan is composed")

    def run(self, layer: int, hidden: Float[Tensor, "v t d"]) -> Float[Tensor, "v t d"]:
        """One block; ``t`` is a view's patches."""
        return self.blocks[layer](hidden, cu_seqlens=None, position_embeddings=self._turn(hidden.device))

    def _turn(self, device: torch.device) -> Turn:
        """Cosine and sine of each patch's angles: a quarter of a head's width by row, a quarter by column, and again.

        Made anew each time: buffers that are not saved would be lost where a model is built without memory.
        """
        width, side = self.config.width // self.config.heads, self.config.patches_per_side
        frequencies = _THETA ** -(torch.arange(0, width // 2, 2, dtype=torch.float32, device=device) / (width // 2))
        angles = torch.arange(side, dtype=torch.float32, device=device)[:, None] * frequencies
        rows = repeat(angles, "h a -> (h w) a", w=side)
        columns = repeat(angles, "w a -> (h w) a", h=side)
        whole = torch.cat([rows, columns, rows, columns], dim=-1)
        return whole.cos(), whole.sin()

    def unreachable(self) -> list[str]:
        """Blocks after the tapped layer."""
        return self._under([f"blocks.{i}" for i in range(self.config.tap, self.config.layers)])

    def load_pretrained(self) -> None:
        kept = {
            key: value
            for key, value in load_huggingface(self.config).state_dict().items()
            if not key.startswith(("merger.", "deepstack_merger_list."))
        }
        take(self, self.config, f"the checkpoint {self.config.checkpoint}", kept)


class _Attention(nn.Module):
    """The library's attention, with its weights, over a batch of views instead of one sequence cut at view's ends.

    The library's own takes a loop over views, and waits for the device to learn their lengths.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = theirs.num_heads, theirs.qkv, theirs.proj

    def forward(
        self, hidden_states: Float[Tensor, "v t d"], cu_seqlens: None, position_embeddings: Turn
    ) -> Float[Tensor, "v t d"]:
        mixed = rearrange(self.qkv(hidden_states), "v t (three n r) -> three v n t r", three=3, n=self.heads)
        query, key = (_turned(part, *position_embeddings) for part in mixed[:2])
        attended = F.scaled_dot_product_attention(query, key, mixed[2])
        return self.proj(rearrange(attended, "v n t r -> v t (n r)"))


def _turned(
    part: Float[Tensor, "v n t r"], cosine: Float[Tensor, "t r"], sine: Float[Tensor, "t r"]
) -> Float[Tensor, "v n t r"]:
    """In float32, as the library does it."""
    first, second = part.float().chunk(2, dim=-1)
    return (part.float() * cosine + torch.cat([-second, first], dim=-1) * sine).to(part.dtype)
