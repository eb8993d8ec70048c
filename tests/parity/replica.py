"""Tiny checkpoints as published ones lie on a disk: the same names of tensors, files and config keys, small widths.

The names are written down here from method F, apart from the converter's own; `index_bytes` proves them against the
size of the published index.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, INNER, VOCABULARY = 16, 24, 704  # of the language model
TOWER, TOWER_INNER, PATCH, SIZE = 12, 20, 4, 16  # of the vision tower
TOWER_NAME = "tiny-clip"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What is particular about a checkpoint. The default is deepstack-l-vicuna-7b: 32 Llama layers, 24 of CLIP."""

    host: str = "llama"
    layers: int = 32
    tower_layers: int = 24
    hd: bool = False
    tied: bool = False
    appended: bool = False  # DeepStack-V at the tower's end: five layers of its own (method B.5)
    dtype: torch.dtype = torch.bfloat16
    shards: int = 3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._decoder_layer().items()}
        shapes["model.norm.weight"] = (WIDTH,)
        if not self.tied:
            shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
        for number, width in ((0, TOWER), (2, WIDTH)):
            shapes[f"model.mm_projector.{number}.weight"] = (WIDTH, width)
            shapes[f"model.mm_projector.{number}.bias"] = (WIDTH,)
        tower = "model.vision_tower.vision_tower.vision_model."
        shapes[f"{tower}embeddings.class_embedding"] = (TOWER,)
        shapes[f"{tower}embeddings.patch_embedding.weight"] = (TOWER, 3, PATCH, PATCH)
        shapes[f"{tower}embeddings.position_embedding.weight"] = (1 + (SIZE // PATCH) ** 2, TOWER)
        for norm in ("pre_layrnorm", "post_layernorm"):
            shapes |= {f"{tower}{norm}.weight": (TOWER,), f"{tower}{norm}.bias": (TOWER,)}
        stems = [f"{tower}encoder.layers.{layer}." for layer in range(self.tower_layers)]
        stems += [f"model.vision_tower.post_encoder.{layer}." for layer in range(5 if self.appended else 0)]
        for stem in stems:
            shapes |= {f"{stem}{name}": shape for name, shape in _clip_layer().items()}
        if self.hd:
            shapes["model.image_newline"] = (WIDTH,)
        return shapes

    def _decoder_layer(self) -> dict[str, tuple[int, ...]]:
        if self.host == "phi3":
            matrices = {
                "self_attn.qkv_proj": (3 * WIDTH, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "mlp.gate_up_proj": (2 * INNER, WIDTH),
                "mlp.down_proj": (WIDTH, INNER),
            }
        else:
            matrices = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
            matrices |= {f"mlp.{x}_proj": (INNER, WIDTH) for x in ("gate", "up")} | {"mlp.down_proj": (WIDTH, INNER)}
        norms = {f"{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        return {f"{name}.weight": shape for name, shape in matrices.items()} | norms

    def tensors(self) -> dict[str, Tensor]:
        """Random values; the same for the same replica."""
        generator = torch.Generator().manual_seed(0)
        return {
            name: (0.1 * torch.randn(shape, generator=generator)).to(self.dtype)
            for name, shape in sorted(self.shapes().items())
        }

    def config(self) -> dict[str, Any]:
        """The published config.json, its keys (method F), which say nothing of deepstack_start_id and the like."""
        llama = {"attention_bias": False, "pretraining_tp": 1}
        phi3 = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096, "sliding_window": 2047}
        values = {
            "_name_or_path": "checkpoints/vicuna-7b-v1.5",
            "architectures": [f"Deepstack{'Phi' if self.host == 'phi3' else 'Llama'}ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freeze_mm_mlp_adapter": False,
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "image_aspect_ratio": "deepstack",
            "initializer_range": 0.02,
            "intermediate_size": INNER,
            "max_position_embeddings": 4096,
            "mm_hidden_size": TOWER,
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": None,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": TOWER_NAME,
            "model_type": "deepstack_phi" if self.host == "phi3" else "deepstack_llama",
            "num_attention_heads": 4,
            "num_crops": 4,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 300.0,
            "tie_word_embeddings": self.tied,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "transformers_version": "4.39.3",
            "tune_mm_mlp_adapter": False,
            "twoviews_unshare": False,
            "use_cache": True,
            "use_mm_proj": True,
            "vocab_size": VOCABULARY,
        }
        values |= phi3 if self.host == "phi3" else llama
        if self.hd:
            values |= {
                "_name_or_path": "checkpoints/llava-v1.6-vicuna-7b",
                "is_anyres_deepstack": True,
                "deepstack_sampling": "2d",
                "mm_resampler_type": None,
                "mm_vision_tower_lr": 2e-06,
                "unfreeze_mm_vision_tower": True,
            }
        if self.appended:
            values["deepstack_args_for_ablation"] = f"2xsample+deepstack_vit+lsvit_start_layer_{self.tower_layers}"
        return values

    def write(
        self,
        folder: Path,
        *,
        tensors: dict[str, Tensor] | None = None,
        spelt: Callable[[str], str] = str,
        **config: Any,
    ) -> Path:
        """The checkpoint in ``folder``, its tower's configuration beside it; ``config`` changes single keys."""
        folder.mkdir(parents=True)
        tensors = {spelt(name): tensor for name, tensor in (tensors or self.tensors()).items()}
        files = [f"model-{number:05}-of-{self.shards:05}.safetensors" for number in range(1, self.shards + 1)]
        places = {name: files[rank * self.shards // len(tensors)] for rank, name in enumerate(sorted(tensors))}
        for file in files:
            held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
            save_file(held, folder / file, {"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
        write(folder / "config.json", {**self.config(), **config})
        write(folder.parent / TOWER_NAME / "config.json", self.tower())
        return folder

    def tower(self) -> dict[str, Any]:
        """A CLIP tower's own configuration."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": TOWER,
            "intermediate_size": TOWER_INNER,
            "num_hidden_layers": self.tower_layers,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
        }


def index_bytes(replica: Replica, total_size: int) -> int:
    """How large the index of a checkpoint of these names is, were it of ``total_size`` bytes in three shards."""
    places = dict.fromkeys(replica.shapes(), "model-00001-of-00003.safetensors")
    values = {"metadata": {"total_size": total_size}, "weight_map": places}
    return len(json.dumps(values, indent=2, sort_keys=True).encode()) + 1  # a line break at the end


def write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _clip_layer() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    matrices = {f"self_attn.{name}": (TOWER, TOWER) for name in _ATTENTION}
    matrices |= {"mlp.fc1": (TOWER_INNER, TOWER), "mlp.fc2": (TOWER, TOWER_INNER)}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{name}.weight": (TOWER,), f"{name}.bias": (TOWER,)}
    return shapes
