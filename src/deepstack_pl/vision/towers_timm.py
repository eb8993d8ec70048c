"""timm's vision transformers, also those that open_clip wraps (SigLIP): the only file that knows timm's parts."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import timm
from open_clip.timm_model import TimmModel
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from deepstack_pl.vision.config import VisionConfig, VisionLibrary, check_weights
from deepstack_pl.vision.towers_face import more_than_tensors, not_at_hand, refuse_other_values
from deepstack_pl.vision.towers_open_clip import load_open_clip
from deepstack_pl.vision.towers_plain import Parts, PlainTower

_NAMES = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "width": "embed_dim",
    "layers": "depth",
    "heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
}


class TimmTower(PlainTower):
    """The timm model that ``vision.family`` names, in the size that conf says."""

    def __init__(self, config: VisionConfig) -> None:
        model = _build(config)
        refuse_other_values(config, f"timm's {config.family}", _shown(config, model))
        super().__init__(config, _parts(model))

    def load_pretrained(self) -> None:
        check_weights(self.config)
        if self.config.library is VisionLibrary.open_clip:
            source, clip = f"open_clip's {self.config.open_clip_model}", load_open_clip(self.config)
            visual, pixels = clip.get_submodule("visual"), open_clip.get_model_preprocess_cfg(clip)
            if not isinstance(visual, TimmModel):
                raise ValueError(
                    f"vision={self.config.name}: {source} wraps no model of timm's, but has a "
                    f"{type(visual).__name__}. Leave vision.family out."
                )
            model: Any = visual.trunk
        else:
            source = f"the checkpoint {self.config.checkpoint}"
            model = _load(self.config)
            pixels = model.pretrained_cfg
        refuse_other_values(self.config, source, {"family": (self.config.family, model.pretrained_cfg["architecture"])})
        _refuse_others(self.config, model)
        pairs = _shown(self.config, model) | {
            "heads": (self.config.heads, model.blocks[0].attn.num_heads),
            "image_size": ((self.config.image_size,) * 2, tuple(model.patch_embed.img_size)),
            "mean": (list(self.config.mean), list(pixels["mean"])),
            "std": (list(self.config.std), list(pixels["std"])),
        }
        refuse_other_values(self.config, source, pairs)
        self.take_parts(_parts(model), source)


def _build(config: VisionConfig) -> Any:
    """timm's model by name, with conf's sizes; nothing is fetched."""
    assert config.family is not None
    if not timm.is_model(config.family):
        raise ValueError(
            f"vision.family={config.family}: timm {timm.__version__} has no such model (a tag of weights is no part "
            "of the name). timm.list_models('vit_*') lists them."
        )
    fields = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    if taken := sorted(fields.keys() & config.architecture.keys()):
        raise ValueError(
            f"vision.architecture.{taken[0]} has a field of vision's own. Take it out of vision.architecture."
        )
    try:
        model = timm.create_model(config.family, pretrained=False, num_classes=0, **fields, **config.architecture)
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"vision.family={config.family} cannot be built with conf's values ({error}). Take a model that is timm's "
            "VisionTransformer, such as vit_base_patch16_224, and in vision.architecture only what that one takes."
        ) from error
    _refuse_others(config, model)
    return model


def _refuse_others(config: VisionConfig, model: Any) -> None:
    """Refuse what is no plain vision transformer."""
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"vision.family={config.family} is a {type(model).__name__} of {type(model).__module__}: its blocks cannot "
            "be run one by one here. Take a model that is a VisionTransformer, such as vit_base_patch16_224."
        )
    odd = {
        "blocks of another kind": not isinstance(model.blocks[0], Block),
        "norm of patches": not isinstance(model.patch_embed.norm, nn.Identity),
        "dropout of patches or positions": not isinstance(model.patch_drop, nn.Identity) or model.pos_drop.p > 0,
        "padded pictures": model.patch_embed.dynamic_img_pad,
        "no learned positions": model.pos_embed is None,
    }
    if any(odd.values()):
        raise ValueError(
            f"vision.family={config.family}: {', '.join(k for k, v in odd.items() if v)} cannot be had here. Take it "
            "out of vision.architecture, or take another model."
        )


def _shown(config: VisionConfig, model: Any) -> dict[str, tuple[Any, Any]]:
    """What timm's name decides and shapes do not show."""
    block = model.blocks[0]
    shown: dict[str, tuple[Any, Any]] = {"layer_norm_eps": (config.layer_norm_eps, block.norm1.eps)}
    if isinstance(block.mlp, Mlp):  # gated ones have an activation of their own
        shown["activation"] = (config.activation, _activation(block.mlp.act))
    return shown


def _activation(act: nn.Module) -> str:
    """As transformers calls it."""
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_pytorch_tanh"
    names = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    return names.get(type(act).__name__, type(act).__name__)


def _load(config: VisionConfig) -> Any:
    """The checkpoint's own model, as its config.json says."""
    assert config.checkpoint is not None
    kind = "local-dir" if Path(config.checkpoint).exists() else "hf-hub"
    try:
        return timm.create_model(f"{kind}:{config.checkpoint}", pretrained=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error.__cause__, UnpicklingError):
            raise more_than_tensors(config) from error
        raise not_at_hand(config, error, "checkpoint at a local folder") from error


def _parts(model: Any) -> Parts:
    tokens = [token for token in (model.cls_token, model.reg_token) if token is not None]
    return Parts(
        patches=model.patch_embed.proj,
        prefix_tokens=tokens,
        positions=model.pos_embed,
        norm=model.norm_pre,
        blocks=model.blocks,
    )
