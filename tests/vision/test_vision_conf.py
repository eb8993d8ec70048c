"""What stands in conf/vision: architectures, counted without memory, and held against the libraries' own registries."""

import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml

from deepstack_pl.vision.config import VisionConfig, VisionInit, VisionLibrary
from deepstack_pl.vision.towers import build_tower

ROOT = Path(__file__).resolve().parents[2]
CONF, DOCS = ROOT / "conf" / "vision", (ROOT / "docs" / "towers.md").read_text(encoding="utf-8")
# Tokens of a view, prefix tokens, parameters.
COUNTS = {
    "clip_l_336": (576, 1, 303_507_456),
    "clip_l_336_hf": (576, 1, 303_505_408),  # open_clip keeps the final norm, 2048
    "siglip_so400m_384": (729, 0, 412_984_944),
    "siglip_so400m_384_hf": (729, 0, 412_984_944),
    "siglip2_so400m_384": (576, 0, 413_016_048),
    "siglip2_so400m_384_hf": (576, 0, 413_016_048),
    "dinov2_l": (1369, 1, 304_365_568),
    "dinov2_l_registers": (1369, 5, 304_369_664),
    "timm_vit_b_16": (196, 1, 85_797_120),
    "qwen3_vl": (2304, 0, 415_891_440),
    "tiny": (16, 1, 263_616),
}


def written(name: str) -> VisionConfig:
    values: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    library = VisionLibrary[values.pop("library", "open_clip")]
    return VisionConfig(**values | {"library": library, "init": VisionInit[values["init"]]})


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_an_option_has_so_many_tokens_and_parameters(name: str) -> None:
    config = written(name)
    with torch.device("meta"):
        tower = build_tower(config)
    counted = sum(parameter.numel() for parameter in tower.parameters())
    assert (config.patches_per_side**2, tower.prefix, counted) == COUNTS[name]
    assert len(tower.blocks) == config.layers


def test_every_option_is_counted() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} == COUNTS.keys()


def test_the_table_of_the_docs_is_what_was_counted() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", DOCS, re.M)
    assert {row[0] for row in rows} == COUNTS.keys()
    for name, library, weights, pixels, tokens, prefix, parameters in rows:
        config = written(name)
        assert (int(tokens), int(prefix), int(parameters.replace(",", ""))) == COUNTS[name]
        assert (library, int(pixels)) == (config.library.name, config.image_size)
        named = [config.checkpoint, config.open_clip_model, config.open_clip_weights]
        assert weights == (", ".join(filter(None, named)) or "none: drawn")


@pytest.mark.parametrize("name", ["siglip_so400m_384", "siglip2_so400m_384", "timm_vit_b_16"])
def test_the_values_of_timms_models_are_those_that_their_names_stand_for(name: str) -> None:
    config = written(name)
    with torch.device("meta"):
        named = timm.create_model(config.family or "", pretrained=False)
        tower = build_tower(config)
    shapes = {key: value.shape for key, value in named.blocks.state_dict().items()}  # type: ignore[union-attr]
    assert {key: value.shape for key, value in tower.blocks.state_dict().items()} == shapes
    assert named.pos_embed.shape[1:] == tower.get_parameter("position_embedding").shape  # type: ignore[union-attr]
    assert named.patch_embed.proj.weight.shape == tower.get_parameter("patch_embedding.weight").shape  # type: ignore
    assert (named.blocks[0].attn.num_heads, named.patch_embed.img_size[0]) == (config.heads, config.image_size)  # type: ignore


@pytest.mark.parametrize("name", ["clip_l_336", "siglip_so400m_384", "siglip2_so400m_384"])
def test_names_and_pixels_of_open_clips_models_are_those_of_its_registry(name: str) -> None:
    config = written(name)
    registered: Any = open_clip.get_model_config(config.open_clip_model or "")
    assert registered["vision_cfg"]["image_size"] == config.image_size
    assert registered["vision_cfg"].get("timm_model_name") == config.family
    weights: Any = open_clip.get_pretrained_cfg(config.open_clip_model or "", config.open_clip_weights or "")
    assert (list(weights["mean"]), list(weights["std"])) == (config.mean, config.std)


def test_timms_pixels_are_those_of_the_weights_that_conf_names() -> None:
    config = written("timm_vit_b_16")
    weights: Any = timm.get_pretrained_cfg((config.checkpoint or "").removeprefix("timm/"))
    assert weights.hf_hub_id == config.checkpoint
    assert (list(weights.mean), list(weights.std)) == (config.mean, config.std)


def test_two_libraries_read_siglip_2_with_the_same_numbers() -> None:
    one, other = written("siglip2_so400m_384"), written("siglip2_so400m_384_hf")
    for key in ("image_size", "patch_size", "width", "layers", "heads", "activation", "layer_norm_eps", "mean", "std"):
        assert getattr(one, key) == getattr(other, key)
