"""Towers of transformers: the only file that knows where it keeps the parts of CLIP, SigLIP and DINOv2.

Models are built from conf's values, without the hub, and read by the library only where pretrained weights are asked
for.
"""

import json
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.utils.hub import cached_file

from deepstack_pl.vision.config import QWEN3_VL, VisionConfig, check_weights
from deepstack_pl.vision.towers_face import more_than_tensors, not_at_hand, refuse_other_values
from deepstack_pl.vision.towers_plain import Parts, PlainTower

_MODELS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    QWEN3_VL: Qwen3VLVisionModel,
}
_NAMES = {  # transformers' names of what conf names, where they are not the same
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "activation": "hidden_act",
}
_BY_RATIO = ("dinov2", "dinov2_with_registers")  # the others name the width between an MLP's layers
# Of a family's own values: how weights were drawn, and what only heads and mergers read, which are not kept.
_NO_ARCHITECTURE = {
    *("initializer_range", "initializer_factor", "layerscale_value", "projection_dim", "vision_use_head"),
    *("use_mask_token", "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),
    *("out_hidden_size", "deepstack_visual_indexes", "spatial_merge_size"),
}
# What follows the embeddings, which are put together here, and the channels of a view.
_NOT_OPEN = {"hidden_dropout_prob", "num_channels", "in_channels"}
# What whole checkpoints hold besides the tower: nothing of it is a part of one.
_BESIDES = (
    *("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "classifier."),
    *("language_model.", "lm_head."),
)


class HuggingFaceTower(PlainTower):
    """CLIP, SigLIP or DINOv2 as transformers builds them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, _parts(build_huggingface(config)))

    def run(self, layer: int, hidden: Float[Tensor, "v t d"]) -> Float[Tensor, "v t d"]:
        return self.blocks[layer](hidden, attention_mask=None)

    def load_pretrained(self) -> None:
        self.take_parts(_parts(load_huggingface(self.config)), f"the checkpoint {self.config.checkpoint}")


def build_huggingface(config: VisionConfig) -> Any:
    """transformers' own model of conf's values, randomly drawn.

    Raises:
        ValueError: ``vision.architecture`` names what that model has not, or what has a field of its own.
    """
    values = huggingface_values(config)
    values._attn_implementation = "sdpa"
    return _model_class(config)(values)


def huggingface_values(config: VisionConfig) -> PreTrainedConfig:
    """The Hugging Face configuration that conf's values describe."""
    assert config.family is not None
    made: Any = CONFIG_MAPPING[config.family] if config.family != QWEN3_VL else Qwen3VLVisionConfig
    fields: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    fields["patch_size"] = config.patch_size
    if config.family == QWEN3_VL:
        fields |= {"depth": fields.pop("num_hidden_layers"), "num_heads": fields.pop("num_attention_heads")}
    else:
        fields |= {"image_size": config.image_size, "layer_norm_eps": config.layer_norm_eps}
    if config.family not in _BY_RATIO:
        fields["intermediate_size"] = round(config.width * config.mlp_ratio)
    elif not float(config.mlp_ratio).is_integer():
        raise ValueError(f"vision.mlp_ratio={config.mlp_ratio}: {config.family} takes whole numbers. Say 4.")
    else:
        fields["mlp_ratio"] = int(config.mlp_ratio)
    known = _own_values(made()).keys() - _NOT_OPEN
    for key in config.architecture:
        if key in fields or key not in known:
            rule = "has a field of vision's own" if key in fields else f"is no value of {config.family}"
            raise ValueError(f"vision.architecture.{key} {rule}. Take it out of vision.architecture.")
    return made(**fields, **config.architecture)


def load_huggingface(config: VisionConfig) -> Any:
    """The checkpoint's own model, whole, after its values were found to be conf's.

    Raises:
        ValueError: it is not at hand, not whole, or of another architecture.
    """
    check_weights(config)
    assert config.checkpoint is not None
    source = f"the checkpoint {config.checkpoint}"
    try:
        whole = AutoConfig.from_pretrained(config.checkpoint)
    except (OSError, ValueError) as error:
        raise not_at_hand(config, error, "checkpoint at a local folder") from error
    theirs = whole.vision_config if "vision_config" in whole.sub_configs else whole
    _refuse_another_tower(config, theirs, source)
    try:
        loaded: Any = _model_class(config).from_pretrained(
            config.checkpoint,
            config=theirs,
            dtype=torch.float32,
            key_mapping={r"^model\.visual\.": ""} if config.family == QWEN3_VL else None,
            ignore_mismatched_sizes=True,  # they are refused below, in a sentence
            output_loading_info=True,
        )
    except OSError as error:
        raise not_at_hand(config, error, "checkpoint at a local folder") from error
    except UnpicklingError as error:
        raise more_than_tensors(config) from error
    model, info = loaded
    left_over = [key for key in info["unexpected_keys"] if not key.removeprefix("model.").startswith(_BESIDES)]
    wrong = {
        "missing": sorted(info["missing_keys"])[:3],
        "of another shape": sorted(map(str, info["mismatched_keys"]))[:3],
        "left over": sorted(left_over)[:3],
    }
    if any(wrong.values()):
        raise ValueError(
            f"vision={config.name}: {source} is not whole: { {k: v for k, v in wrong.items() if v} }. Fetch it again, "
            "or name another."
        )
    return model


def _refuse_another_tower(config: VisionConfig, theirs: PreTrainedConfig, source: str) -> None:
    """Every value of the architecture; the pixels' mean and deviation where the checkpoint says them."""
    pairs: dict[str, tuple[Any, Any]] = {"family": (config.family, theirs.model_type)}
    refuse_other_values(config, source, pairs)
    mine, other = _own_values(huggingface_values(config)), _own_values(theirs)
    pairs |= {key: (mine[key], other[key]) for key in mine.keys() - _NO_ARCHITECTURE}
    assert config.checkpoint is not None
    file = cached_file(config.checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        with open(file, encoding="utf-8") as opened:
            pixels = json.load(opened)
        for ours, name in (("mean", "image_mean"), ("std", "image_std")):
            if name in pixels:
                pairs[ours] = (list({"mean": config.mean, "std": config.std}[ours]), list(pixels[name]))
    refuse_other_values(config, source, pairs)


def _own_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What this family has, and not every configuration."""
    general = PreTrainedConfig().to_dict().keys()
    return {key: value for key, value in config.to_dict().items() if key not in general}


def _model_class(config: VisionConfig) -> type[PreTrainedModel]:
    assert config.family is not None
    return _MODELS[config.family]


def _parts(model: Any) -> Parts:
    """Where each family keeps its parts."""
    embeddings = model.embeddings
    if isinstance(model, (CLIPVisionModel, SiglipVisionModel)):
        clip = isinstance(model, CLIPVisionModel)
        return Parts(
            patches=embeddings.patch_embedding,
            prefix_tokens=[embeddings.class_embedding] if clip else [],
            positions=embeddings.position_embedding.weight,
            norm=model.pre_layrnorm if clip else nn.Identity(),
            blocks=model.encoder.layers,
        )
    registers = [embeddings.register_tokens] if isinstance(model, Dinov2WithRegistersModel) else []
    return Parts(
        patches=embeddings.patch_embeddings.projection,
        prefix_tokens=[embeddings.cls_token, *registers],
        positions=embeddings.position_embeddings,
        norm=nn.Identity(),
        blocks=model.encoder.layer,
    )
