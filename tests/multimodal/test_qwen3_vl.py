"""Qwen3-VL's plan is Qwen3-VL: transformers' own model is the oracle, tiny and random."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_vision
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from deepstack_pl.cli.main import main
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import Receipt
from deepstack_pl.language.conversation import load_tokenizer, save_tokenizer
from deepstack_pl.language.host import CARRIER, Carrier, decoder_layers, install
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.multimodal.published import files
from deepstack_pl.multimodal.qwen3_vl import convert_qwen3_vl
from deepstack_pl.stacking.config import ModelConfig, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.views import normalise

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
QWEN3_STYLE = ModelConfig(name="qwen3_style", tiles=0, source=Source.tap, taps=[1, 2, 3], groups=3)


def entering(layers) -> list[torch.Tensor]:
    """What each layer is given, in a list that fills as the model runs. Hooks of the host come first."""
    given: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    return given


def test_layer_inputs_under_the_qwen3_plan_equal_those_of_transformers_own_text_model() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e6}
    theirs = Qwen3VLTextModel(
        Qwen3VLTextConfig(**TEXT, rope_parameters={**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True})
    ).eval()
    ours = Qwen3ForCausalLM(Qwen3Config(**TEXT, rope_parameters=rope)).eval()
    ours.model.load_state_dict(theirs.state_dict())
    plan = Plan.build(QWEN3_STYLE, llm_layers=5, vit_layers=tiny_vision().tap)
    install(ours, plan)
    embeds, taps = torch.randn(2, 12, 32), torch.randn(3, 7, 32)
    index = torch.full((2, 12), -1)
    index[0, 2:6], index[1, 5:8] = torch.arange(4), torch.arange(4, 7)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    expected, found = entering(theirs.layers), entering(decoder_layers(ours))
    with torch.no_grad():
        theirs(
            inputs_embeds=embeds, attention_mask=mask, visual_pos_masks=index >= 0, deepstack_visual_embeds=list(taps)
        )
        carrier = Carrier(features=taps, index=index, scales=None, traces=None)
        ours(inputs_embeds=embeds, attention_mask=mask, **{CARRIER: carrier})
    assert len(found) == len(expected) == 5
    for layer, (own, there) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(own, there, msg=lambda text, layer=layer: f"layer {layer}: {text}")
    assert not torch.equal(found[1], found[0])


VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


@pytest.fixture(scope="module")
def theirs() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": 600, "rope_parameters": rope},
        vision_config=VISION,
        image_token_id=599,
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # norms and biases too
    return model


@pytest.fixture
def checkpoint(theirs, tmp_path: Path) -> Path:
    folder = tmp_path / "qwen"
    theirs.save_pretrained(folder)
    save_tokenizer(load_tokenizer(None), folder)
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def as_they_cut(view: torch.Tensor, patch: int) -> torch.Tensor:
    """One normalised view [3, s, s] as rows of patches, block by block of 2 x 2, each the still image twice."""
    blocks = rearrange(view, "c (h a y) (w b x) -> (h w a b) c y x", a=2, b=2, y=patch, x=patch)
    return repeat(blocks, "n c y x -> n (c t y x)", t=2)


@pytest.mark.parametrize("size", [24, 32])
def test_a_converted_qwen3_vl_gives_its_own_logits_at_its_own_and_at_another_size(theirs, checkpoint, tmp_path, size):
    convert_qwen3_vl(str(checkpoint), tmp_path / "ours", image_size=size, template="shipped", report=lambda line: None)
    ours = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = DeepStackProcessor.from_pretrained(tmp_path / "ours")
    images = [picture(0, 50, 40), picture(1, 30, 30)]
    batch = processor(["<image>What?", "<image>And what is this?"], [[image] for image in images])
    pixels = normalise(batch["views"], ours.config.typed_vision())
    side = size // 4
    placeholder = batch["token_index"] >= 0
    position = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = ours(**batch).logits
        expected = theirs(
            input_ids=batch["input_ids"].masked_fill(placeholder, 599),
            attention_mask=batch["attention_mask"],
            position_ids=position.expand(3, -1, -1),
            pixel_values=torch.cat([as_they_cut(view, 4) for view in pixels]),
            image_grid_thw=torch.tensor([[1, side, side]] * 2),
        ).logits
    real = batch["attention_mask"].bool()
    assert float(expected[real].std()) > 0.1
    torch.testing.assert_close(found[real], expected[real], atol=1e-5 * float(expected.abs().max()), rtol=0)
    ours.own_projectors["tap_1"].linear_fc2.weight.data.zero_()
    assert not torch.allclose(ours(**batch).logits[real], expected[real], atol=1e-3), "the taps matter"


def test_a_qwen3_vl_is_converted_on_the_command_line_and_starts_a_run_or_is_refused_in_a_sentence(
    checkpoint, tmp_path, capsys
):
    assert main(["convert", str(checkpoint), str(tmp_path / "ours"), "--template", "shipped"]) == 0
    said = capsys.readouterr().out
    assert "tap 0 -> llm" not in said
    assert "a view is 24 pixels, 9 positions in the text" in said
    assert take_receipt_of(tmp_path / "ours").ok
    files = {"image_size": ["--image-size", "30"], "tower": ["--vision-tower", str(tmp_path)]}
    told = {
        "image_size": "--image-size 30: squares of 2x2 patches of 4 pixels",
        "tower": "--vision-tower with a Qwen",
    }
    for name, more in files.items():
        assert main(["convert", str(checkpoint), str(tmp_path / name), "--template", "shipped", *more]) == 1
        assert told[name] in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_a_qwen3_vl_with_a_tensor_too_few_or_too_many_is_refused_by_name(checkpoint, tmp_path):
    stored = load_file(checkpoint / "model.safetensors")
    merger = stored.pop("model.visual.deepstack_merger_list.1.norm.weight")
    for spoilt, said in (
        (stored, r"1 missing: model.visual.deepstack_merger_list.1.norm.weight"),
        ({**stored, "model.visual.deepstack_merger_list.1.norm.weight": merger, "x": merger.clone()}, "1 left over: x"),
    ):
        save_file(spoilt, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            convert_qwen3_vl(str(checkpoint), tmp_path / "ours", template="shipped")
        assert not (tmp_path / "ours").exists()


def spoilt(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"] |= values
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes=\[2, 0\] do not ascend"),
        ({"hidden_act": "silu"}, "hidden_act='silu' of the tower is none of gelu, gelu_pytorch_tanh, quick_gelu"),
        ({"num_position_embeddings": 35}, "num_position_embeddings=35 of the tower is no square"),
    ],
)
def test_what_would_be_another_model_here_is_refused(checkpoint, tmp_path, values, said):
    spoilt(checkpoint, **values)
    with pytest.raises(ValueError, match=said):
        convert_qwen3_vl(str(checkpoint), tmp_path / "ours", template="shipped")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("size", [0, -24])
def test_no_view_is_as_small_as_that(checkpoint, tmp_path, size):
    with pytest.raises(ValueError, match=f"--image-size {size}: squares of 2x2 patches"):
        convert_qwen3_vl(str(checkpoint), tmp_path / "ours", image_size=size, template="shipped")


def test_a_tied_checkpoint_stays_tied_also_where_it_stores_its_head(theirs, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    stored = load_file(checkpoint / "model.safetensors")
    embeddings = stored["model.language_model.embed_tokens.weight"]
    for number, head in enumerate((None, embeddings.clone())):
        kept = {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}
        kept |= {} if head is None else {"lm_head.weight": head}
        save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
        convert_qwen3_vl(str(checkpoint), tmp_path / str(number), template="shipped", report=lambda line: None)
        ours = DeepStackForConditionalGeneration.from_pretrained(tmp_path / str(number))
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
        assert torch.equal(ours.get_input_embeddings().weight, embeddings)
    save_file({**kept, "lm_head.weight": embeddings + 1}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 left over: lm_head.weight"):
        convert_qwen3_vl(str(checkpoint), tmp_path / "other", template="shipped")


def test_a_mixture_of_experts_is_refused_by_its_name(checkpoint, tmp_path, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_moe"}))
    assert main(["convert", str(checkpoint), str(tmp_path / "ours")]) == 1
    assert "is a qwen3_vl_moe: of that family only qwen3_vl itself can be converted" in capsys.readouterr().err


def test_every_file_that_a_conversion_reads_is_fetched_from_the_hub(checkpoint, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(files, "snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or "")
    files.checkpoint_folder("Qwen/Qwen3-VL-8B-Instruct")
    assert {"config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json"} <= set(asked)


def take_receipt_of(folder: Path) -> Receipt:
    model = DeepStackForConditionalGeneration.from_pretrained(folder)
    return take_receipt(model, DeepStackProcessor.from_pretrained(folder))
