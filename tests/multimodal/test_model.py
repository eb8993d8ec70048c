import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from oracle import forward_slowly
from packaging.version import Version
from tiny import MIXED, PLANS, batch_of, picture, prompts, samples, tiny_llm, tiny_model, tiny_vision
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import AutoModelForImageTextToText

from deepstack_pl.batch import PadSide
from deepstack_pl.multimodal.build import build_model, parts
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.stacking.config import Dealing, Host, InjectionConfig, ModelConfig, Operator, Source
from deepstack_pl.training.config import Checkpointing
from deepstack_pl.training.sharding import checkpoint_activations

SIDES = [PadSide.right, PadSide.left]


def gated(config: ModelConfig) -> ModelConfig:
    return replace(config, operator=Operator.gated_add, name="gated")


def open_gates(model: DeepStackForConditionalGeneration) -> None:
    for gate in model.gates.values():
        gate.data.uniform_(0.3, 1.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*PLANS, "gated", "strided_1d", "tiles"])
def test_fast_path_equals_the_oracle_in_logits_and_gradients(name: str, side: PadSide) -> None:
    l_plan = PLANS["deepstack_l"]
    plan = {
        "gated": gated(l_plan),
        "strided_1d": replace(l_plan, dealing=Dealing.strided_1d),
        "tiles": replace(l_plan, dealing=Dealing.tiles),
    }.get(name) or PLANS[name]
    model = tiny_model(plan)
    open_gates(model)
    slow = copy.deepcopy(model)
    batch = batch_of(model, side=side)
    logits = model(**batch.model_inputs()).logits[batch.attention_mask]
    expected = torch.cat([forward_slowly(slow, ids, images)[0] for ids, images in MIXED])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, fast), naive in zip(model.named_parameters(), slow.parameters(), strict=True):
        if fast.requires_grad:
            assert fast.grad is not None, key
            torch.testing.assert_close(fast.grad, naive.grad, atol=1e-3, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


TAPS = ModelConfig(name="taps", tiles=0, source=Source.tap, taps=[1, 2, 3], groups=3, start_layer=1)


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_v", "deepstack_lv", "taps"])
@pytest.mark.parametrize("style", ["full", "selective", "hugging_face", "reentrant", "wrapper"])
def test_activation_checkpointing_leaves_gradients_alone(name: str, style: str) -> None:
    """Of several groups, and of the tower that they all come from."""
    model = tiny_model(PLANS.get(name, TAPS))
    plain = copy.deepcopy(model)
    if style in Checkpointing.__members__:
        checkpoint_activations(model.train(), Checkpointing[style])
    elif style != "wrapper":
        model.language_model.train()
        model.language_model.gradient_checkpointing_enable({"use_reentrant": style == "reentrant"})
    else:
        blocks = {*model.language_model.get_decoder().layers, *model.vision_tower.tower.blocks}
        apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: m in blocks)
    batch = batch_of(model)
    weights = torch.randn(*batch.input_ids.shape, 64, generator=torch.Generator().manual_seed(0))
    if style == "reentrant" and name != "deepstack_v" and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(RuntimeError, match="through the graph a second time"):  # loud, and not ours to mend
            (model(**batch.model_inputs(), use_cache=False).logits * weights).sum().backward()
        return
    for each in (model, plain):
        (each(**batch.model_inputs(), use_cache=False).logits * weights).sum().backward()
    expected = {k: p.grad for k, p in plain.named_parameters() if p.grad is not None}
    assert any(gradient.any() for key, gradient in expected.items() if key.startswith("vision_tower"))
    found = {
        k.replace("_checkpoint_wrapped_module.", ""): p.grad for k, p in model.named_parameters() if p.grad is not None
    }
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)


def test_without_groups_the_llm_is_the_untouched_hugging_face_model() -> None:
    model = tiny_model(PLANS["baseline"])
    batch = batch_of(model, MIXED[:1])
    ours = model(**batch.model_inputs()).logits
    stock = type(model.language_model)(model.config.text_config).eval()
    stock.load_state_dict(model.language_model.state_dict())
    theirs = stock(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    assert torch.equal(ours, theirs)


def test_zeroed_groups_equal_no_stacking() -> None:
    stacked, plain = tiny_model(PLANS["deepstack_l"]), tiny_model(replace(PLANS["deepstack_l"], groups=0))
    batch = batch_of(stacked)
    inputs = batch.model_inputs() | {"group_rows": torch.full_like(batch.group_rows, -1)}
    expected = plain(**(batch_of(plain).model_inputs())).logits
    # Not to the bit: a plan that reads no tiles runs none, and a smaller batch rounds in another way.
    torch.testing.assert_close(stacked(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert (stacked(**batch.model_inputs()).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", list(PLANS))
def test_an_image_in_row_1_leaves_row_0_bit_identical(name: str) -> None:
    model = tiny_model(PLANS[name])
    one = [([1, 5, 6, 7, 2], []), ([1, 63, 11, 12, 2], [picture(0, 64, 64)])]
    other = [one[0], (one[1][0], [picture(9, 64, 64)])]
    first, second = (model(**batch_of(model, rows).model_inputs()).logits for rows in (one, other))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_second_image_of_a_sample_lands_in_its_own_place() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    batch = batch_of(model)
    record = model(**batch.model_inputs(), record=True).record
    visual = (batch.input_ids == 63) & batch.attention_mask
    assert [t.injection.layer for t in record] == [1, 2, 3, 4]
    assert torch.equal(record[0].touched, visual)
    assert torch.equal(record[1].touched, visual)
    # Row 2: the first image is cut 3x1, so that the fourth group reaches only the second one, cut 2x2.
    assert record[3].touched[2].nonzero().flatten().tolist() == list(range(20, 36))
    assert visual[2].nonzero().flatten().tolist() == [*range(2, 18), *range(20, 36)]


def test_text_only_batch_leaves_no_gradient_absent_and_adds_exactly_zero() -> None:
    for name, plan in PLANS.items():
        model = tiny_model(plan)
        batch = batch_of(model, MIXED[:1])
        assert len(batch.views) == 1
        model(**batch.model_inputs()).loss.backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (name, key)
                if not key.startswith("language_model"):
                    assert not parameter.grad.any(), (name, key)


@pytest.mark.parametrize("name", list(PLANS))
def test_greedy_with_cache_equals_without_and_each_row_alone(name: str) -> None:
    model = tiny_model(PLANS[name])
    batch = batch_of(model, side=PadSide.left)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**prompts(batch), **arguments)
    assert torch.equal(cached, model.generate(**prompts(batch), **arguments, use_cache=False))
    for row, case in enumerate(MIXED):
        alone = batch_of(model, [case], PadSide.left)
        new = model.generate(**prompts(alone), **arguments)[0, alone.input_ids.shape[1] :]
        assert torch.equal(cached[row, batch.input_ids.shape[1] :], new)


def test_greedy_equals_the_oracle_token_by_token() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    ids, images = MIXED[2]
    batch = batch_of(model, [MIXED[2]], PadSide.left)
    new = model.generate(**prompts(batch), max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = list(ids)
    for token in new[0, batch.input_ids.shape[1] :].tolist():
        assert forward_slowly(model, ids, images)[0][-1].argmax().item() == token
        ids.append(token)


@pytest.mark.parametrize("name", list(PLANS))
def test_half_precision_takes_the_processors_pixels_as_they_are(name: str) -> None:
    model = tiny_model(PLANS[name])
    batch = batch_of(model)
    full = model(**batch.model_inputs()).logits
    half = model.to(torch.bfloat16)(**batch.model_inputs(), record=True)
    assert all(trace.added.dtype is torch.bfloat16 for trace in half.record)
    valid = batch.attention_mask
    assert (half.logits.float() - full)[valid].abs().max() < 0.1 * full[valid].abs().max()


def test_beams_and_returned_sequences_keep_their_image() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    arguments = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "num_return_sequences": 2,
        "eos_token_id": None,
        "do_sample": False,
    }
    batch = batch_of(model, side=PadSide.left)
    together = model.generate(**prompts(batch), **arguments)[:, batch.input_ids.shape[1] :]
    for row, case in enumerate(MIXED):
        alone = batch_of(model, [case], PadSide.left)
        expected = model.generate(**prompts(alone), **arguments)[:, alone.input_ids.shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2], expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", list(PLANS))
def test_saved_and_loaded_model_gives_the_same_logits(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(PLANS[name], tied=tied, seed=3)
    model.save_pretrained(tmp_path)
    batch = batch_of(model)
    expected = model(**batch.model_inputs()).logits
    for loader in (DeepStackForConditionalGeneration, AutoModelForImageTextToText):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.plan == model.plan
        assert torch.equal(loaded(**batch.model_inputs()).logits, expected)
        assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == set(model.unreachable())


def test_a_folder_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model(PLANS["deepstack_l"]).save_pretrained(tmp_path)
    other = build_model(
        PLANS["deepstack_l"], tiny_llm(layers=7), tiny_vision(), ProjectorConfig(name="mlp"), seed=0, image_token_id=63
    )
    with pytest.raises(ValueError, match=r"llm.num_hidden_layers \(7, there 6\)"):
        load_weights(other, tmp_path)
    with pytest.raises(ValueError, match="there is no model"):
        load_weights(other, tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_one_plan_start_another(tied: bool, tmp_path: Path) -> None:
    source = tiny_model(PLANS["deepstack_l"], tied=tied, seed=1)
    source.save_pretrained(tmp_path)
    target = tiny_model(PLANS["baseline"], tied=tied, seed=2)
    load_weights(target, tmp_path)
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_shared_parts_start_equal_in_every_arm_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = [tiny_model(plan, seed=5) for plan in PLANS.values()]
    assert torch.equal(before, torch.get_rng_state())
    reference = models[0].state_dict()
    for model in models[1:]:
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, reference[key]), key
    assert not torch.equal(tiny_model(PLANS["baseline"], seed=6).projector[0].weight, reference["projector.0.weight"])


def test_every_parameter_belongs_to_a_part_and_unreachable_ones_are_frozen() -> None:
    model = tiny_model(gated(PLANS["deepstack_l"]))
    sorted_in = parts(model)
    assert sum(map(len, sorted_in.values())) == len(list(model.parameters()))
    assert ("gates.llm", model.gates["llm"]) in sorted_in["projector"]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(model.unreachable())
    assert any("resblocks.3." in name for name in frozen)
    assert not any("resblocks.2." in name for name in frozen)


def test_plan_made_for_another_depth_is_refused() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    config = model.config.to_dict()
    config["text_config"]["num_hidden_layers"] = 5
    with pytest.raises(ValueError, match="made for an LLM of 6 layers, but LlamaForCausalLM has 5"):
        DeepStackForConditionalGeneration(type(model.config).from_dict(config))


def test_placeholders_without_views_are_refused() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    with pytest.raises(ValueError, match="image placeholders, but no views"):
        model(input_ids=torch.tensor([[1, 63, 5]]))
    with pytest.raises(ValueError, match="come together"):
        model(input_ids=torch.tensor([[1, 63, 5]]), views=torch.zeros(1, 3, 16, 16))


def test_meta_model_knows_every_shape_without_weights() -> None:
    model = build_model(
        PLANS["deepstack_l"],
        tiny_llm(),
        tiny_vision(),
        ProjectorConfig(name="mlp"),
        seed=0,
        image_token_id=63,
        device="meta",
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_forward_and_backward_leave_no_state_behind() -> None:
    model = tiny_model(PLANS["deepstack_lv"])
    first, second = batch_of(model, MIXED[1:2]), batch_of(model, MIXED[2:3])
    expected = model(**first.model_inputs()).logits
    model(**second.model_inputs()).loss.backward()
    with pytest.raises(ValueError, match="come together"):
        model(**{**first.model_inputs(), "views": None})
    assert torch.equal(model(**first.model_inputs()).logits, expected)


def test_explicit_injections_reach_both_hosts_in_one_pass() -> None:
    plan = ModelConfig(
        name="mine",
        groups=0,
        injections=[
            InjectionConfig(host=Host.vit, group=3, layer=3),
            InjectionConfig(host=Host.llm, group=2, layer=5),
            InjectionConfig(host=Host.llm, group=2, layer=0),
        ],
    )
    model = tiny_model(plan)
    record = model(**batch_of(model, MIXED[1:2]).model_inputs(), record=True).record
    assert [(t.injection.host, t.injection.layer) for t in record] == [(Host.vit, 3), (Host.llm, 0), (Host.llm, 5)]
    assert all(len(s.group_rows) == 1 for s in samples(model))
