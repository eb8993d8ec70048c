"""Tiny towers of every library and family, and what the library itself makes of the same weights."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from einops import rearrange
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipTransformer
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from deepstack_pl.vision.config import QWEN3_VL, VisionConfig, VisionInit, VisionLibrary
from deepstack_pl.vision.towers import build_tower
from deepstack_pl.vision.towers_face import Tower

_SIZE: dict[str, Any] = {"name": "tiny", "image_size": 16, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
_PLAIN = _SIZE | {"mlp_ratio": 2.0, "quick_gelu": False, "layer_norm_eps": 1e-6}
_HF = _PLAIN | {"library": VisionLibrary.huggingface}
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_TIMM = _PLAIN | _HALF | {"library": VisionLibrary.timm, "family": "vit_base_patch16_224"}
_QUICK = {"layer_norm_eps": 1e-5, "quick_gelu": True}
_VALUES: dict[str, dict[str, Any]] = {
    "open_clip": _SIZE | {"mlp_ratio": 2.0},
    "clip": _HF | _QUICK | {"family": "clip_vision_model"},
    "siglip": _HF | {"family": "siglip_vision_model", "gelu_tanh": True, "image_size": 18},
    "dinov2": _HF | {"family": "dinov2"},
    "registers": _HF | {"family": "dinov2_with_registers", "architecture": {"num_register_tokens": 3}},
    "timm": _TIMM,
    "timm_registers": _TIMM | {"architecture": {"reg_tokens": 2, "no_embed_class": True}},
    "timm_placed_registers": _TIMM | {"architecture": {"reg_tokens": 2, "init_values": 0.5}},
    "timm_clip": _PLAIN | _QUICK | {"library": VisionLibrary.timm, "family": "vit_base_patch32_clip_quickgelu_224"},
    "timm_siglip": _TIMM | {"family": "vit_base_patch16_siglip_224", "image_size": 18},
    "qwen3_vl": _HF | {"family": QWEN3_VL, "gelu_tanh": True, "architecture": {"num_position_embeddings": 9}},
}
CONFIGS = {name: VisionConfig(**values) for name, values in _VALUES.items()}
ALL = sorted(CONFIGS)

# As the libraries call the same values.
_THEIRS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_CLIP: dict[str, Any] = _THEIRS | {"intermediate_size": 32, "hidden_act": "quick_gelu"}
_DINO: dict[str, Any] = _THEIRS | {"mlp_ratio": 2}
_QWEN: dict[str, Any] = {
    **{"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4, "out_hidden_size": 24},
    **{"num_position_embeddings": 9, "deepstack_visual_indexes": [0, 1]},
}
TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
_STACK = ExitStack()  # folders of weights live as long as the tests


def library_model(name: str) -> nn.Module:
    """The library's own model, every parameter random: a fresh one's ones and zeros would hide what is left out."""
    torch.manual_seed(0)
    siglip: dict[str, Any] = _THEIRS | {"intermediate_size": 32, "image_size": 18}
    make: dict[str, Any] = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**_CLIP)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**siglip)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**_DINO)),
        "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3)),
        "qwen3_vl": lambda: Qwen3VLVisionModel(Qwen3VLVisionConfig(**_QWEN)),
        "open_clip": lambda: OpenClipTransformer(16, 4, 16, 3, 2, 2.0, output_dim=8, act_layer=QuickGELU),
    }
    model = make[name]() if name in make else timm.create_model(CONFIGS[name].family or "", **timm_arguments(name))
    return drawn_anew(model)


def timm_arguments(name: str) -> dict[str, Any]:
    return TIMM | {"img_size": CONFIGS[name].image_size} | CONFIGS[name].architecture


def drawn_anew(model: nn.Module) -> Any:
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def drawn(name: str, **changes: Any) -> Tower:
    torch.manual_seed(0)
    return drawn_anew(build_tower(replace(CONFIGS[name], **changes)))


def saved(name: str, model: nn.Module, folder: Path) -> VisionConfig:
    """The library's own folder of ``model``, and the configuration that names it."""
    if CONFIGS[name].library is VisionLibrary.timm:
        save_for_hf(model, str(folder), model_args=timm_arguments(name), safe_serialization=True)
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
    return replace(CONFIGS[name], init=VisionInit.pretrained, checkpoint=str(folder))


@cache
def filled(name: str) -> tuple[Any, Any]:
    """A tower that has loaded the weights of the library's own model, and that model."""
    model = library_model(name)
    if name == "open_clip":  # its loading has tests of its own
        tower = build_tower(CONFIGS[name])
        tower.load_state_dict({f"visual.{k}": v for k, v in model.state_dict().items() if k != "proj"})
        return tower.eval(), model
    folder = Path(_STACK.enter_context(TemporaryDirectory())) / "saved"
    tower = build_tower(saved(name, model, folder)).eval()
    tower.load_pretrained()
    return tower, model


def pictures(tower: Tower, count: int = 3) -> Tensor:
    size = tower.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def states(tower: Tower, views: Tensor) -> list[Tensor]:
    """Hidden states 0 to the last."""
    found = [tower.embed(views)]
    for layer in range(len(tower.blocks)):
        found.append(tower.run(layer, found[-1]))
    return found


@torch.no_grad()
def library_states(model: Any, views: Tensor) -> list[Tensor]:
    """What enters the library's first block, and what leaves each, in the library's own pass."""
    where = {"CLIPVisionModel": "encoder.layers", "SiglipVisionModel": "encoder.layers", "Dinov2Model": "encoder.layer"}
    where |= {"Dinov2WithRegistersModel": "encoder.layer"}
    if isinstance(model, OpenClipTransformer):
        blocks = model.transformer.resblocks
    else:
        blocks = model.get_submodule(where.get(type(model).__name__, "blocks"))
    found: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda _, __, output: found.append(output)) for block in blocks]
    if not isinstance(model, Qwen3VLVisionModel):
        model(views)
    else:
        # Blocks of 2x2 patches, each the same frame twice; one long sequence.
        flat = rearrange(views, "v c (h a p) (w b q) -> (v h w a b) c 1 p q", a=2, b=2, p=4, q=4)
        grid = torch.tensor([[1, 4, 4]] * len(views))
        model(flat.expand(-1, -1, 2, -1, -1).flatten(1), grid_thw=grid)
        found = [rearrange(s, "(v h w a b) d -> v (h a w b) d", v=len(views), h=2, w=2, a=2, b=2) for s in found]
    for hook in hooks:
        hook.remove()
    return found
