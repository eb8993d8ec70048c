import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from ablations import TAPS
from safetensors.torch import load_file, save_file
from tiny import PLANS, tiny_llm, tiny_model, tiny_vision

from deepstack_pl.language.config import LLMConfig, LLMInit
from deepstack_pl.multimodal.build import build_model, text_config
from deepstack_pl.multimodal.config import ProjectorConfig, ProjectorKind
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.stacking.config import ModelConfig, Operator
from deepstack_pl.vision.config import VisionConfig, VisionInit


def build(
    llm: LLMConfig | None = None, vision: VisionConfig | None = None, **more
) -> DeepStackForConditionalGeneration:
    projector = ProjectorConfig(name="p", kind=more.pop("kind", ProjectorKind.mlp2x_gelu))
    plan = more.pop("plan", PLANS["deepstack_l"])
    return build_model(
        plan, llm or tiny_llm(), vision or tiny_vision(), projector, seed=0, image_token_id=63, **more
    ).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[LLMConfig, DeepStackForConditionalGeneration]:
    source = build()
    for parameter in source.language_model.parameters():
        parameter.data.add_(0.5)  # weights that no random build gives
    source.language_model.save_pretrained(tmp_path / "llm")
    return replace(tiny_llm(), checkpoint=str(tmp_path / "llm"), init=LLMInit.pretrained), source


def test_pretrained_llm_arrives_whole(checkpoint) -> None:
    llm, source = checkpoint
    loaded = build(llm)
    for key, tensor in source.language_model.state_dict().items():
        assert torch.equal(loaded.language_model.state_dict()[key], tensor), key


def test_a_checkpoint_with_a_tensor_missing_is_refused(checkpoint) -> None:
    llm, _ = checkpoint
    file = Path(llm.checkpoint) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not whole: .*layers\.2\.mlp\.up_proj"):
        build(llm)


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_an_llm_that_there_is_as_pickles_alone_is_read_and_nothing_of_them_is_run(checkpoint, tmp_path: Path) -> None:
    llm, source = checkpoint
    file = Path(llm.checkpoint) / "model.safetensors"
    tensors = load_file(file)
    torch.save(tensors | {"bomb": Bomb(tmp_path / "ran")}, file.with_name("pytorch_model.bin"))
    assert torch.equal(build(llm).language_model.lm_head.weight, source.language_model.lm_head.weight)
    file.unlink()  # safetensors come first: until here nobody has looked at the other
    with pytest.raises(ValueError, match="holds more than tensors, and nothing of it was run"):
        build(llm)
    assert not (tmp_path / "ran").exists()
    torch.save(tensors, file.with_name("pytorch_model.bin"))
    loaded = build(llm)
    for key, tensor in source.language_model.state_dict().items():
        assert torch.equal(loaded.language_model.state_dict()[key], tensor), key


@pytest.mark.parametrize("asked", [{}, {"use_safetensors": False}, {"weights_only": False}])
def test_a_runs_folder_that_holds_pickles_alone_is_refused(asked: dict, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict() | {"bomb": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    DeepStackForConditionalGeneration.from_pretrained(tmp_path, **asked)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds its weights as \.bin, pickles that run code.*with safetensors"):
        DeepStackForConditionalGeneration.from_pretrained(tmp_path, **asked)
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        load_weights(model, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 2), ("rope_theta", 500.0)])
def test_conf_and_checkpoint_that_disagree_are_refused_by_key(checkpoint, key: str, value: float) -> None:
    llm, _ = checkpoint
    wrong = replace(llm, architecture=llm.architecture | {key: value})
    with pytest.raises(ValueError, match=r"conf and the checkpoint .* disagree") as error:
        build(wrong)
    assert str(value) in str(error.value)


def test_weights_that_are_not_at_hand_say_where_they_come_from_and_what_to_do() -> None:
    llm = replace(tiny_llm(), name="phi3", checkpoint="microsoft/Phi-3-mini-4k-instruct", init=LLMInit.pretrained)
    with pytest.raises(ValueError, match="llm=phi3: the weights of microsoft/Phi-3-mini-4k-instruct are not") as error:
        build(llm)
    assert "Hugging Face hub" in str(error.value)
    assert "llm.init=random builds the same architecture" in str(error.value)
    with pytest.raises(ValueError, match=r"needs llm\.checkpoint"):
        build(replace(llm, checkpoint=None))
    with pytest.raises(ValueError, match=r"llm.family=llamma: no model type"):
        text_config(replace(tiny_llm(), family="llamma"))


@pytest.fixture
def clip(tmp_path: Path) -> tuple[VisionConfig, open_clip.CLIP]:
    values = tiny_vision()
    tower = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 4, "head_width": 8, "mlp_ratio": 4.0}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "tiny-clip-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip-for-tests.json")
    model = open_clip.create_model("tiny-clip-for-tests").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return replace(
        values,
        init=VisionInit.pretrained,
        open_clip_model="tiny-clip-for-tests",
        open_clip_weights=str(tmp_path / "weights.pt"),
    ), model


def test_pretrained_tower_gives_open_clips_own_hidden_states(clip) -> None:
    vision, model = clip
    loaded = build(vision=replace(vision, feature_layer=-1), plan=PLANS["baseline"])
    views = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stock = model.visual.forward_intermediates(views, indices=[3], normalize_intermediates=False)
    expected = stock["image_intermediates"][0].flatten(2).transpose(1, 2)
    found = loaded.vision_tower(views, torch.empty(0, 32, dtype=torch.long))[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_tower_of_another_architecture_is_refused(clip) -> None:
    vision, _ = clip
    with pytest.raises(ValueError, match="is not the architecture written in conf/vision"):
        build(vision=replace(vision, layers=3))


@pytest.mark.parametrize("change", [{"heads": 4}, {"quick_gelu": False}, {"mean": [0.5, 0.5, 0.5]}])
def test_a_tower_that_differs_in_what_shapes_do_not_show_is_refused(clip, change: dict) -> None:
    vision, _ = clip
    with pytest.raises(ValueError, match=f"disagree .*'{next(iter(change))}'"):
        build(vision=replace(vision, **change))


def test_weights_of_a_run_with_other_heads_start_nothing(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    other = tiny_llm()
    other.architecture["num_attention_heads"] = 8
    other.architecture["head_dim"] = 8
    with pytest.raises(ValueError, match=r"of another architecture: llm\.num_attention_heads \(8, there 4\)"):
        load_weights(build(other), tmp_path)
    with pytest.raises(ValueError, match=r"of another architecture: vision\.heads"):
        load_weights(build(vision=replace(tiny_vision(), heads=4)), tmp_path)


def test_a_tower_without_weights_at_hand_says_what_to_do(clip) -> None:
    vision, _ = clip
    with pytest.raises(ValueError, match=r"are not at hand.*vision\.init=random"):
        build(vision=replace(vision, open_clip_weights="nowhere.pt"))
    with pytest.raises(ValueError, match="Name both"):
        build(vision=replace(vision, open_clip_weights=None))


def test_linear_projector_is_one_matrix() -> None:
    assert {n for n, _ in build(kind=ProjectorKind.linear).projector.named_parameters()} == {"weight", "bias"}


def test_meta_model_needs_no_checkpoint() -> None:
    llm = replace(tiny_llm(), checkpoint="nobody/nothing", init=LLMInit.pretrained)
    assert next(build(llm, device="meta").parameters()).is_meta


def test_views_that_do_not_fit_and_features_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=18 is not a multiple of vision\.patch_size=4"):
        replace(tiny_vision(), image_size=18)
    with pytest.raises(ValueError, match=r"feature_layer=-6 names no hidden state of a tower of 4 layers"):
        replace(tiny_vision(), feature_layer=-6)


def test_a_start_from_another_plan_keeps_what_that_plan_had_none_of_and_refuses_what_this_one_has_none_of(tmp_path):
    gated = ModelConfig(name="gated", operator=Operator.gated_add)
    plain, gates = tiny_model(PLANS["deepstack_l"], seed=1), tiny_model(gated, seed=2)
    plain.save_pretrained(tmp_path / "plain")
    assert load_weights(plain, tmp_path / "plain") == []
    assert load_weights(gates, tmp_path / "plain") == ["gates.llm"]
    torch.nn.init.ones_(gates.gates["llm"])
    gates.save_pretrained(tmp_path / "gated")
    with pytest.raises(ValueError, match=r"that run's plan owns gates.llm, and this one has no place for it"):
        load_weights(plain, tmp_path / "gated")


def test_mergers_of_a_plans_taps_are_drawn_anew_and_named_where_a_run_without_them_starts_one(tmp_path: Path) -> None:
    plain, tapped = tiny_model(PLANS["baseline"]), tiny_model(TAPS)
    plain.save_pretrained(tmp_path / "plain")
    tapped.save_pretrained(tmp_path / "tapped")
    merger = tapped.own_projectors["tap_0"][0].weight.clone()
    drawn = load_weights(tapped, tmp_path / "plain")
    kinds = [f"{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")]
    assert drawn == [f"own_projectors.tap_{k}.{kind}" for k in (0, 1) for kind in kinds]
    assert torch.equal(tapped.own_projectors["tap_0"][0].weight, merger)
    with pytest.raises(ValueError, match=r"that run's plan owns own_projectors\.tap_0.* no place for it"):
        load_weights(plain, tmp_path / "tapped")


def test_a_taps_projector_starts_no_tap_of_another_depth(tmp_path: Path) -> None:
    tiny_model(TAPS).save_pretrained(tmp_path)
    assert load_weights(tiny_model(TAPS), tmp_path) == []
    with pytest.raises(ValueError, match=r"read the hidden states \[1, 2\], but this plan taps \[2, 1\]"):
        load_weights(tiny_model(replace(TAPS, taps=[2, 1])), tmp_path)
