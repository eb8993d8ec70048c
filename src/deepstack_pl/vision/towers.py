"""Vision towers behind one face: embed, blocks. The only file that knows where open_clip keeps its parts."""

from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from deepstack_pl.vision.config import VisionConfig


class OpenClipTower(nn.Module):
    """An open_clip vision transformer, taken apart so that the encoder can run its blocks one by one.

    Attributes:
        prefix: tokens before the patches (the class token).
    """

    prefix = 1

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            output_dim=config.width,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
            norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        )
        self.visual.proj = None  # the contrastive head: never used here

    def embed(self, views: Float[Tensor, "v 3 s s"]) -> Float[Tensor, "v t d"]:
        """Patches, class token and positions, normalised: hidden state 0."""
        return self.visual._embeds(views)

    def embed_together(self, tiles: Float[Tensor, "v 3 s s"], grid: tuple[int, int]) -> Float[Tensor, "i t d"]:
        """The same of enlarged images: ``grid`` (columns, rows) tiles of each are one, with one class token.

        Positions of patches are interpolated to the larger lattice, bicubic, as the published code meant to (method
        A.6): patches do not overlap, so that those of the tiles are those of the whole.
        """
        visual, (columns, rows) = self.visual, grid
        patches = visual.conv1(tiles)
        lattice = rearrange(patches, "(i r c) d h w -> i (r h c w) d", r=rows, c=columns)
        positions = visual.positional_embedding
        own = rearrange(positions[1:], "(h w) d -> 1 d h w", h=self.config.patches_per_side)
        size = [n * self.config.patches_per_side for n in (rows, columns)]
        larger = F.interpolate(own.float(), size=size, mode="bicubic", align_corners=False).to(own.dtype)
        first = (visual.class_embedding + positions[0]).expand(len(lattice), 1, -1)
        return visual.ln_pre(torch.cat([first, lattice + rearrange(larger, "1 d h w -> (h w) d")], dim=1))

    @property
    def dtype(self) -> torch.dtype:
        """What views must be cast to: pixels arrive in float32 whatever the weights are."""
        return self.visual.conv1.weight.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    def run(self, layer: int, hidden: Float[Tensor, "v t d"]) -> Float[Tensor, "v t d"]:
        """One block, from hidden state ``layer`` to the next; ``t`` may be any number of tokens after the prefix."""
        return self.blocks[layer](hidden)

    def unreachable(self) -> list[str]:
        """Names of parameters that no feature depends on: blocks after the tapped layer, the final norm."""
        names = ["visual.ln_post"]
        if not self.config.tap:
            names.append("visual.class_embedding")
        names += [f"visual.transformer.resblocks.{i}" for i in range(self.config.tap, self.config.layers)]
        return [n for n, _ in self.named_parameters() if any(n == name or n.startswith(f"{name}.") for name in names)]

    def load_pretrained(self) -> None:
        """Take the weights that ``vision.open_clip_weights`` names.

        Raises:
            ValueError: they are not at hand, or belong to another architecture.
        """
        name, weights = self.config.open_clip_model, self.config.open_clip_weights
        if not name or not weights:
            raise ValueError(
                f"vision={self.config.name}: init is pretrained, but vision.open_clip_model={name} and "
                f"vision.open_clip_weights={weights}. Name both, or set vision.init=random."
            )
        try:
            clip = open_clip.create_model(name, pretrained=weights)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"vision={self.config.name}: the weights {weights!r} of open_clip's {name} are not at hand "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). open_clip fetches them from the Hugging Face "
                "hub: connect once, or point vision.open_clip_weights at a local file. vision.init=random builds the "
                "same architecture with random weights."
            ) from error
        visual = clip.get_submodule("visual")
        if not isinstance(visual, VisionTransformer):
            raise ValueError(
                f"vision={self.config.name}: open_clip's {name} has a {type(visual).__name__}, whose blocks "
                "cannot be run one by one here. Choose a model with a VisionTransformer."
            )
        self._refuse_another_tower(visual, open_clip.get_model_preprocess_cfg(clip))
        loaded = visual.state_dict()
        loaded.pop("proj", None)
        own = {key: tuple(value.shape) for key, value in self.visual.state_dict().items()}
        theirs = {key: tuple(value.shape) for key, value in loaded.items()}
        if own != theirs:
            wrong = sorted(set(own.items()) ^ set(theirs.items()))[:4]
            raise ValueError(
                f"vision={self.config.name}: open_clip's {name} is not the architecture written in conf/vision; "
                f"first differences: {wrong}. Correct width, layers, heads, patch_size or image_size."
            )
        self.visual.load_state_dict(loaded)

    def _refuse_another_tower(self, theirs: VisionTransformer, pixels: dict[str, Any]) -> None:
        """What shapes do not show, and what a wrong conf would change in silence."""
        block = theirs.transformer.resblocks[0]
        assert isinstance(block, ResidualAttentionBlock)
        values = {
            "heads": (self.config.heads, block.attn.num_heads),
            "layer_norm_eps": (self.config.layer_norm_eps, block.ln_1.eps),
            "quick_gelu": (self.config.quick_gelu, isinstance(block.mlp.get_submodule("gelu"), QuickGELU)),
            "mean": (list(self.config.mean), list(pixels["mean"])),
            "std": (list(self.config.std), list(pixels["std"])),
        }
        differ = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
        if differ:
            raise ValueError(
                f"vision={self.config.name}: conf and open_clip's {self.config.open_clip_model} disagree (conf, "
                f"open_clip): {differ}. Correct conf/vision."
            )
