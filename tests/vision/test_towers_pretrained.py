"""Pretrained towers: whole, of conf's architecture, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import CONFIGS, TIMM, drawn, drawn_anew, filled, library_model, library_states, pictures, saved, states
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, SiglipConfig, SiglipModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from deepstack_pl.multimodal.config import ProjectorKind
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.published.keys import rename_to_published
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig, VisionInit, VisionLibrary
from deepstack_pl.vision.encoder import VisionEncoder
from deepstack_pl.vision.towers import build_tower
from deepstack_pl.vision.towers_face import Tower

TEXT = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": 64, "max_position_embeddings": 8},
}


def loaded(config: VisionConfig) -> Tower:
    tower = build_tower(config).eval()
    tower.load_pretrained()
    return tower


@pytest.fixture
def checkpoint(tmp_path: Path) -> VisionConfig:
    return saved("clip", library_model("clip"), tmp_path / "clip")


@pytest.mark.parametrize("name", ["clip", "siglip", "qwen3_vl"])
def test_the_tower_of_a_whole_checkpoint_is_taken_and_the_rest_left(name: str, tmp_path: Path) -> None:
    tower = library_model(name).config.to_dict()  # type: ignore[union-attr]
    if name == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        text = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "rope_parameters": rope}
        config = Qwen3VLConfig(vision_config=tower | {"out_hidden_size": 16}, text_config=text)
        whole: Any = drawn_anew(Qwen3VLForConditionalGeneration(config))
        own = whole.model.visual
    else:
        make, of = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}[name]
        whole = drawn_anew(make(of(vision_config=tower, text_config=TEXT)))
        own = whole.vision_model
    whole.save_pretrained(tmp_path)
    found = loaded(replace(CONFIGS[name], init=VisionInit.pretrained, checkpoint=str(tmp_path)))
    views = pictures(found)
    for mine, theirs in zip(states(found, views), library_states(own, views), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("clip", {"heads": 4}, "num_attention_heads"),
        ("clip", {"quick_gelu": False}, "hidden_act"),
        ("clip", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ("clip", {"image_size": 20}, "image_size"),
        ("clip", {"layers": 2}, "num_hidden_layers"),
        ("clip", {"family": "siglip_vision_model"}, "family"),
        ("registers", {"architecture": {"num_register_tokens": 4}}, "num_register_tokens"),
        ("qwen3_vl", {"architecture": {"num_position_embeddings": 16}}, "num_position_embeddings"),
        ("timm", {"heads": 4}, "heads"),
        ("timm", {"mean": [0.4, 0.5, 0.5]}, "mean"),
        ("timm", {"image_size": 20}, "image_size"),
        ("timm", {"family": "vit_large_patch16_224"}, "family"),
    ],
)
def test_conf_and_checkpoint_that_disagree_are_refused_by_key(
    name: str, changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    config = saved(name, library_model(name), tmp_path / "saved")
    with pytest.raises(ValueError, match=f"conf and the checkpoint .* disagree .*'{key}'"):
        loaded(replace(config, **changes))


def test_a_tower_of_other_shapes_is_refused(tmp_path: Path) -> None:
    config = saved("timm_registers", library_model("timm_registers"), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is not the architecture written in conf/vision.*prefix_tokens"):
        loaded(replace(config, architecture={"reg_tokens": 1, "no_embed_class": True}))


def test_pixels_prepared_otherwise_are_refused_where_the_checkpoint_says_how(checkpoint: VisionConfig) -> None:
    assert checkpoint.checkpoint is not None
    file = Path(checkpoint.checkpoint) / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": checkpoint.mean, "image_std": checkpoint.std}))
    loaded(checkpoint)
    file.write_text(json.dumps({"image_mean": checkpoint.mean, "image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"disagree .*'std'"):
        loaded(checkpoint)


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint: VisionConfig, change: str) -> None:
    assert checkpoint.checkpoint is not None
    file = Path(checkpoint.checkpoint) / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.layers.1.mlp.fc1.weight"
    name = next(key for key in tensors if key.endswith(name))
    if change == "missing":
        del tensors[name]
    elif change == "left over":
        tensors[name.replace("layers.1", "layers.3")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, :-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is not whole: .*'{change}': .*fc1"):
        loaded(checkpoint)


@pytest.mark.parametrize("name", ["clip", "qwen3_vl", "timm"])
def test_weights_that_are_not_at_hand_say_where_they_come_from_and_what_to_do(name: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], init=VisionInit.pretrained, checkpoint="nobody/nothing")
    with pytest.raises(ValueError, match=r"nobody/nothing are not at hand .*connect once, or point vision\.checkpoint"):
        loaded(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="are not at hand"):
        loaded(replace(config, checkpoint=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"vision\.checkpoint=None\. Name a hub id"):
        loaded(replace(config, checkpoint=None))


def test_open_clip_and_transformers_read_the_same_clip_alike_at_every_layer(tmp_path: Path) -> None:
    ours, _ = filled("open_clip")
    plan = Plan.build(ModelConfig(name="p", tiles=0, groups=0), llm_layers=4, vit_layers=ours.config.tap)
    config = DeepStackConfig(
        vision=vision_values(ours.config), plan=plan.to_dict(), projector=ProjectorKind.linear.value
    )
    tensors = {f"vision_tower.tower.{key}": value for key, value in ours.state_dict().items()}
    renamed = rename_to_published(tensors, config)
    theirs = CLIPVisionModel(CLIPVisionConfig(**library_model("clip").config.to_diff_dict()))  # type: ignore[union-attr]
    start = "model.vision_tower.vision_tower.vision_model."
    theirs.load_state_dict({key.removeprefix(start): value for key, value in renamed.items()})
    other = loaded(saved("clip", theirs, tmp_path))
    views = pictures(ours)
    for one, two in zip(states(ours, views), states(other, views), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=2e-6)
    features = []
    for tower in (ours, other):  # layer -2, without the class token
        encoder = VisionEncoder(tower.config, plan)
        encoder.tower = tower
        features.append(encoder(views[:1], torch.empty(0, 16, dtype=torch.long))[0])
    assert features[0].shape == (1, 16, 16)
    torch.testing.assert_close(*features, atol=2e-6, rtol=2e-6)


@pytest.fixture
def wrapped(tmp_path: Path) -> tuple[VisionConfig, Any]:
    """A CLIP of open_clip's with a tower of timm's, as its SigLIPs are."""
    tower = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 8, "vocab_size": 64, "width": 96, "heads": 2, "layers": 1}
    values = {"embed_dim": 96, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "tiny-siglip-for-tests.json").write_text(json.dumps(values))
    open_clip.add_model_config(tmp_path / "tiny-siglip-for-tests.json")
    model = drawn_anew(open_clip.create_model("tiny-siglip-for-tests"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return VisionConfig(
        **{"name": "tiny", "family": "test_vit3", "image_size": 160, "patch_size": 16, "width": 96, "layers": 9},
        **{"heads": 3, "mlp_ratio": 2.0, "quick_gelu": False, "layer_norm_eps": 1e-6, "init": VisionInit.pretrained},
        open_clip_model="tiny-siglip-for-tests",
        open_clip_weights=str(tmp_path / "weights.pt"),
    ), model


def test_a_tower_that_open_clip_takes_from_timm_has_open_clips_hidden_states(wrapped) -> None:
    config, model = wrapped
    tower = loaded(config)
    views = pictures(tower, 1)
    for mine, theirs in zip(states(tower, views), library_states(model.visual.trunk, views), strict=True):
        assert torch.equal(mine, theirs)


def test_a_tower_that_open_clip_takes_from_timm_is_held_to_conf(wrapped) -> None:
    config, _ = wrapped
    for change in ({"heads": 2}, {"std": [0.5, 0.5, 0.5]}, {"family": "vit_base_patch16_224"}):
        with pytest.raises(ValueError, match=f"disagree .*'{next(iter(change))}'"):
            loaded(replace(config, **change))
    with pytest.raises(ValueError, match=r"has a TimmModel, which is none of open_clip's own .*vision\.family"):
        loaded(replace(config, family=None))


def test_a_pretrained_tower_stays_what_it_was_through_a_config_file() -> None:
    for name in ("registers", "timm_clip", "qwen3_vl", "open_clip"):
        config = CONFIGS[name]
        plan = Plan.build(ModelConfig(name="p", tiles=0, groups=0), llm_layers=4, vit_layers=config.tap)
        written = json.loads(json.dumps(vision_values(config)))
        assert DeepStackConfig(vision=written, plan=plan.to_dict()).typed_vision() == config


def test_a_config_file_from_before_there_were_other_libraries_is_an_open_clip_tower() -> None:
    values = vision_values(VisionConfig(name="clip"))
    for key in ("library", "family", "checkpoint", "gelu_tanh", "architecture"):
        del values[key]
    read = DeepStackConfig(vision=values).typed_vision()
    assert read == VisionConfig(name="clip")
    assert read.library is VisionLibrary.open_clip


def test_open_clips_own_transformer_is_not_looked_for_in_timm(tmp_path: Path) -> None:
    tower = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 3, "head_width": 8, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-vit-for-tests.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path / "tiny-vit-for-tests.json")
    torch.save(open_clip.create_model("tiny-vit-for-tests").state_dict(), tmp_path / "weights.pt")
    named = {"open_clip_model": "tiny-vit-for-tests", "open_clip_weights": str(tmp_path / "weights.pt")}
    config = replace(CONFIGS["timm"], library=VisionLibrary.open_clip, init=VisionInit.pretrained, **named)
    with pytest.raises(ValueError, match=r"wraps no model of timm's, but has a VisionTransformer\. Leave"):
        loaded(config)
    assert drawn("timm").config.heads == TIMM["num_heads"]


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["clip", "timm", "open_clip"])
def test_pickles_of_a_tower_run_nothing(name: str, tmp_path: Path) -> None:
    bomb = {"weight": torch.zeros(2), "more": Bomb(tmp_path / "ran")}
    if name == "open_clip":
        torch.save(bomb, tmp_path / "weights.bin")
        config = replace(CONFIGS[name], init=VisionInit.pretrained, open_clip_model="ViT-B-32")
        config = replace(config, open_clip_weights=str(tmp_path / "weights.bin"))
    else:
        config = saved(name, library_model(name), tmp_path / "there")
        (tmp_path / "there/model.safetensors").unlink()
        torch.save(bomb, tmp_path / "there/pytorch_model.bin")
    with pytest.raises(ValueError, match="hold more than tensors, and nothing of them was run"):
        loaded(config)
    assert not (tmp_path / "ran").exists()


def test_a_tower_whose_weights_are_pickles_of_tensors_is_read(checkpoint: VisionConfig) -> None:
    assert checkpoint.checkpoint is not None
    expected, folder = loaded(checkpoint).state_dict(), Path(checkpoint.checkpoint)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = loaded(checkpoint).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
