"""open_clip's own vision transformer: the only file that knows where open_clip keeps its parts."""

from functools import partial
from pickle import UnpicklingError

import open_clip
import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from deepstack_pl.vision.config import VisionConfig, check_weights
from deepstack_pl.vision.towers_face import Tower, more_than_tensors, not_at_hand, refuse_other_values, take


class OpenClipTower(Tower):
    """An open_clip vision transformer; its prefix is the class token."""

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
            act_layer=_activation(config),
            norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        )
        self.visual.proj = None  # the contrastive head: never used here

    def patches(self, pixels: Float[Tensor, "v 3 y x"]) -> Float[Tensor, "v h w d"]:
        return rearrange(self.visual.conv1(pixels), "v d h w -> v h w d")

    def positions(self) -> Float[Tensor, "p2 d"]:
        return self.visual.positional_embedding[1:]

    def finish(self, tokens: Float[Tensor, "v n d"]) -> Float[Tensor, "v t d"]:
        first = self.visual.class_embedding.to(tokens.dtype) + self.visual.positional_embedding[0].to(tokens.dtype)
        return self.visual.ln_pre(torch.cat([first.expand(len(tokens), 1, -1), tokens], dim=1))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def blocks(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.visual.transformer.resblocks

    def unreachable(self) -> list[str]:
        """Blocks after the tapped layer, the final norm."""
        names = ["visual.ln_post"]
        if not self.config.tap:
            names.append("visual.class_embedding")
        names += [f"visual.transformer.resblocks.{i}" for i in range(self.config.tap, self.config.layers)]
        return self._under(names)

    def load_pretrained(self) -> None:
        clip, source = load_open_clip(self.config), f"open_clip's {self.config.open_clip_model}"
        visual = clip.get_submodule("visual")
        if not isinstance(visual, VisionTransformer):
            raise ValueError(
                f"vision={self.config.name}: {source} has a {type(visual).__name__}, which is none of open_clip's own "
                "vision transformers. Where it wraps one of timm's, vision.family names that."
            )
        block, pixels = visual.transformer.resblocks[0], open_clip.get_model_preprocess_cfg(clip)
        assert isinstance(block, ResidualAttentionBlock)
        act = block.mlp.get_submodule("gelu")
        pairs = {
            "heads": (self.config.heads, block.attn.num_heads),
            "layer_norm_eps": (self.config.layer_norm_eps, block.ln_1.eps),
            "quick_gelu": (self.config.quick_gelu, isinstance(act, QuickGELU)),
            "gelu_tanh": (self.config.gelu_tanh, isinstance(act, nn.GELU) and act.approximate == "tanh"),
            "mean": (list(self.config.mean), list(pixels["mean"])),
            "std": (list(self.config.std), list(pixels["std"])),
        }
        refuse_other_values(self.config, source, pairs)
        take(self.visual, self.config, source, {k: v for k, v in visual.state_dict().items() if k != "proj"})


def load_open_clip(config: VisionConfig) -> nn.Module:
    """open_clip's whole model, with the weights that conf names.

    Raises:
        ValueError: conf names none, or they are not at hand.
    """
    check_weights(config)
    assert config.open_clip_model is not None
    try:
        return open_clip.create_model(config.open_clip_model, pretrained=config.open_clip_weights)
    except UnpicklingError as error:
        raise more_than_tensors(config) from error
    except (OSError, RuntimeError) as error:
        raise not_at_hand(config, error, "open_clip_weights at a local file") from error


def _activation(config: VisionConfig) -> partial[nn.GELU] | type[QuickGELU] | type[nn.GELU]:
    return partial(nn.GELU, approximate="tanh") if config.gelu_tanh else QuickGELU if config.quick_gelu else nn.GELU
