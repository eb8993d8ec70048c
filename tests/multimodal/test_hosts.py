"""Every family of LLMs as a host: its tiny twin under a plan, beside the stock Hugging Face model.

The oracle is the stock model itself, without our hooks: what each layer is to be given besides is encoded slowly, image
by image (`oracle`), and added by a plain hook at the places where the images stand.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llms import twin
from oracle import encode_slowly
from PIL import Image
from tiny import IMAGE_TOKEN, MIXED, PLANS, batch_of, prompts, tiny_vision
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from deepstack_pl.batch import PadSide
from deepstack_pl.language.config import Attention, LLMConfig
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.multimodal.build import build_model, text_config
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.stacking.config import Host, ModelConfig

FAMILIES = ["phi3", "llama3_8b", "qwen3_0_6b", "smollm2_135m", "mistral_7b", "gemma3_1b", "granite"]
TIED = {"qwen3_0_6b", "smollm2_135m", "gemma3_1b", "granite"}
LAYERS = 6  # Gemma's sixth is its first that sees everything
PLAN = PLANS["deepstack_l"]


def host(name: str, plan: ModelConfig = PLAN, attention: Attention = Attention.sdpa) -> Any:
    llm = replace(twin(name, LAYERS), attention=attention)
    if llm.architecture.get("sliding_window"):
        llm.architecture["sliding_window"] = 24  # less than two images, and than the longest prompt here
    projector = ProjectorConfig(name="mlp")
    return build_model(plan, llm, tiny_vision(), projector, seed=0, image_token_id=IMAGE_TOKEN).eval()


def stock_of(model: DeepStackForConditionalGeneration) -> PreTrainedModel:
    """The same LLM as Hugging Face makes it, with the same weights."""
    stock = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="sdpa").eval()
    stock.load_state_dict(model.language_model.state_dict())
    return stock


def layer_inputs(llm: PreTrainedModel, into: list[Tensor]) -> None:
    """Collects what each layer is given, after whatever hooks it holds already."""
    for layer in decoder_layers(llm):
        layer.register_forward_pre_hook(lambda _, args: into.append(args[0]))


@torch.no_grad()
def slowly(model: DeepStackForConditionalGeneration, ids: list[int], images: list[Image.Image]) -> list[Tensor]:
    """Every layer's input and the logits of one sample, by the stock model."""
    stock, pieces, added, remaining, at = stock_of(model), [], [], list(images), 0
    for token in ids:
        if token == IMAGE_TOKEN:
            tokens, groups = encode_slowly(model, remaining.pop(0))
            added.append((at, groups))
        else:
            tokens = stock.get_input_embeddings()(torch.tensor([token]))
        pieces.append(tokens)
        at += len(tokens)

    def adds(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0].clone()
            for injection in model.plan.at(Host.llm).get(number, ()):
                for start, groups in added:
                    if injection.dealt in groups:
                        group = groups[injection.dealt]
                        hidden[0, start : start + len(group)] += group
            return (hidden, *args[1:])

        return hook

    for number, layer in enumerate(decoder_layers(stock)):
        layer.register_forward_pre_hook(adds(number))
    seen: list[Tensor] = []
    layer_inputs(stock, seen)
    logits = stock(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits
    return [each[0] for each in (*seen, logits)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_alone_is_the_stock_models_to_the_bit(name: str) -> None:
    model = host(name)
    batch = batch_of(model, MIXED[:1])
    ours = model(**batch.model_inputs()).logits
    theirs = stock_of(model)(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_nothing_leave_the_stock_models_logits_to_the_bit(name: str) -> None:
    model, seen = host(name), []
    batch = batch_of(model)
    inputs = batch.model_inputs() | {"group_rows": torch.full_like(batch.group_rows, -1)}
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    ours = model(**inputs, use_cache=False).logits
    hook.remove()
    theirs = stock_of(model)(
        inputs_embeds=seen[0], attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    assert torch.equal(ours, theirs)
    assert (model(**batch.model_inputs()).logits - ours)[batch.attention_mask].abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layers_input_and_the_logits_are_the_oracles(name: str) -> None:
    model, seen = host(name), []
    batch = batch_of(model)
    layer_inputs(model.language_model, seen)
    with torch.no_grad():
        logits = model(**batch.model_inputs(), use_cache=False).logits
    found = [*seen, logits]
    for row, (ids, images) in enumerate(MIXED):
        expected = slowly(model, ids, images)
        assert len(expected) == len(found) == LAYERS + 1
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[row, : len(theirs)], theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_a_cache_equals_without(name: str) -> None:
    model = host(name)
    batch = batch_of(model, side=PadSide.left)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**prompts(batch), **arguments)
    assert torch.equal(cached, model.generate(**prompts(batch), **arguments, use_cache=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_host_is_itself_again_and_tied_where_its_family_is(name: str, tmp_path: Path) -> None:
    model = host(name)
    model.save_pretrained(tmp_path)
    loaded = DeepStackForConditionalGeneration.from_pretrained(tmp_path)
    batch = batch_of(model)
    assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)
    assert load_weights(host(name), tmp_path) == []  # nothing of it is another architecture's
    for each in (model, loaded):
        tied = each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert tied == (name in TIED)
    assert loaded.config.text_config.to_dict() == {
        **model.config.text_config.to_dict(),
        **{key: loaded.config.text_config.to_dict()[key] for key in ("dtype", "architectures")},
    }


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("phi3", Attention.eager),
        ("gemma3_1b", Attention.eager),
        pytest.param("gemma3_1b", Attention.flex_attention, marks=pytest.mark.slow),  # it compiles
    ],
)
def test_attention_is_the_same_by_every_implementation(name: str, attention: Attention) -> None:
    model, plain = host(name, attention=attention), host(name)
    assert model.language_model.config._attn_implementation == attention.value
    for side in PadSide:
        batch = batch_of(model, side=side)
        with torch.no_grad():
            found, expected = (each(**batch.model_inputs(), use_cache=False).logits for each in (model, plain))
        torch.testing.assert_close(found[batch.attention_mask], expected[batch.attention_mask], atol=1e-4, rtol=1e-4)


class TestMultipliers:
    """Gemma multiplies within its embedding, Granite's decoder whatever it is given."""

    TIMES = {"gemma3_1b": (96**0.5, 1.0), "granite": (12.0, 12.0)}  # noqa: RUF012

    @pytest.mark.parametrize("name", TIMES)
    def test_text_and_visual_tokens_of_the_first_layer(self, name: str) -> None:
        model, seen = host(name), []
        batch = batch_of(model, MIXED[1:2])
        layer_inputs(model.language_model, seen)
        with torch.no_grad():
            model(**batch.model_inputs())
            visual, _ = encode_slowly(model, MIXED[1][1][0])
        of_text, of_images = self.TIMES[name]
        first, where = seen[0][0], batch.token_index[0] >= 0
        table = model.get_input_embeddings().weight
        torch.testing.assert_close(first[~where], table[batch.input_ids[0, ~where]] * of_text, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first[where], visual * of_images, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("start", [0, 2])
    @pytest.mark.parametrize("name", TIMES)
    def test_groups_are_added_as_they_are_at_any_layer(self, name: str, start: int) -> None:
        model, before, after = host(name, replace(PLAN, start_layer=start, groups=1)), [], []
        layer = decoder_layers(model.language_model)[start]
        own = dict(layer._forward_pre_hooks)
        layer._forward_pre_hooks.clear()  # to look on both sides of the injection
        layer._forward_pre_hooks_with_kwargs.clear()
        layer.register_forward_pre_hook(lambda _, args: before.append(args[0]))
        for hook in own.values():
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        layer.register_forward_pre_hook(lambda _, args: after.append(args[0]))
        batch = batch_of(model, MIXED[1:2])
        with torch.no_grad():
            model(**batch.model_inputs())
            _, groups = encode_slowly(model, MIXED[1][1][0])
        (group,) = groups.values()
        where = batch.token_index[0] >= 0
        torch.testing.assert_close((after[0] - before[0])[0, where], group, atol=1e-4, rtol=1e-3)

    def test_transformers_own_vision_models_treat_visual_tokens_alike(self) -> None:
        """Gemma 3 merges them as they are; LLaVA on Granite hands them to the decoder, which multiplies them."""
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"image_size": 16, "patch_size": 4}
        gemma = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text_config(twin("gemma3_1b", LAYERS)),
                vision_config=SiglipVisionConfig(**sizes, vision_use_head=False),
                mm_tokens_per_image=16,
                image_token_id=IMAGE_TOKEN,
            )
        )
        llava = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=text_config(twin("granite", LAYERS)),
                vision_config=CLIPVisionConfig(**sizes),
                image_token_id=IMAGE_TOKEN,
            )
        )
        for name, model in (("gemma3_1b", gemma), ("granite", llava)):
            projected, seen = [], []
            model.model.multi_modal_projector.register_forward_hook(lambda *args, into=projected: into.append(args[2]))
            layer_inputs(model, seen)
            with torch.no_grad():
                ids = torch.tensor([[5, *[IMAGE_TOKEN] * 16, 6]])
                model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))
            torch.testing.assert_close(seen[0][0, 1:17], projected[0][0] * self.TIMES[name][1])


@pytest.mark.parametrize("name", ["phi3", "gemma3_1b"])
def test_rotary_frequencies_stay_in_float32_where_a_model_is_cast(name: str, tmp_path: Path) -> None:
    """In bfloat16 a late position's angle would be off by radians; a folder loaded in bfloat16 keeps them, too."""
    model = host(name)
    model.save_pretrained(tmp_path)
    loaded = DeepStackForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    cast = nn.ModuleList([model]).bfloat16()[0]  # as a trainer casts: from above
    frequencies = {n: b for n, b in cast.named_buffers() if n.endswith("inv_freq")}
    assert frequencies
    for n, buffer in frequencies.items():
        assert buffer.dtype is torch.float32, n
        assert torch.equal(buffer, loaded.get_buffer(n)), n
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}


def test_a_family_without_an_option_needs_no_code() -> None:
    granite: LLMConfig = twin("granite")
    assert (granite.family, granite.checkpoint) == ("granite", None)
    assert type(host("granite").language_model).__name__ == "GraniteForCausalLM"
