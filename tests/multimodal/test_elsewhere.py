"""How DeepStack broke in other systems, tried here: docs/reliability.md says where each of these happened."""

import copy
import inspect
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ablations import ARMS, TAPS, Arm, assert_like_the_oracle, batch_for, collated, model_of, samples_of
from tiny import MIXED, PLANS, batch_of, picture, tiny_model
from torch import Tensor, nn

from deepstack_pl.batch import PadSide
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import ModelConfig, Source
from deepstack_pl.training.config import Spread
from deepstack_pl.training.sharding import units

TEXT, ONE, TWO, WIDE = MIXED


def gradients(model: DeepStackForConditionalGeneration, rows: list | None = None) -> dict[str, Tensor]:
    batch = batch_of(model, rows)
    weights = torch.randn(*batch.input_ids.shape, 64, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    (model(**batch.model_inputs(), use_cache=False).logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Numbers and gradients


class Viewed(torch.autograd.Function):
    """Gives back a view of what it was given, which autograd lets nobody write into."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden[:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv"])
def test_a_stream_that_must_not_be_written_into_is_injected_into(name: str) -> None:
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        Viewed.apply(torch.zeros(2, requires_grad=True)).add_(1)
    model = tiny_model(PLANS[name])
    expected, seen = gradients(model), []

    def view(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(module)
        return (Viewed.apply(args[0]), *args[1:])

    for block in (*decoder_layers(model.language_model), *model.vision_tower.tower.blocks):
        block.register_forward_pre_hook(view, prepend=True)
    found = gradients(model)
    assert len(seen) == 6 + 3, "the tower's last block reaches no feature"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_group_is_added_to_the_whole_residual_stream_in_its_dtype_and_nowhere_else(dtype: torch.dtype) -> None:
    """(h + residual) + group, to the bit: another order of the sum is another number in few bits."""
    model = tiny_model(PLANS["deepstack_l"]).to(dtype)
    entered: list[Tensor] = []
    for layer in decoder_layers(model.language_model):
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))  # behind the injection
    with torch.no_grad():
        output = model(**batch_of(model).model_inputs(), record=True, output_hidden_states=True)
    added = {trace.injection.layer: trace.added for trace in output.record}
    assert sorted(added) == [1, 2, 3, 4]
    for number, after in enumerate(entered):
        before = output.hidden_states[number]
        assert before.dtype is after.dtype is dtype
        assert torch.equal(after, before + added[number] if number in added else before), number


@pytest.mark.parametrize("half", ["language_model", "vision"])
@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv", "taps"])
def test_hosts_of_different_dtypes_meet_in_the_dtype_of_the_stream(name: str, half: str) -> None:
    model = model_of(Arm(TAPS)) if name == "taps" else tiny_model(PLANS[name])
    plain = copy.deepcopy(model)
    for part in [model.language_model] if half == "language_model" else [model.vision_tower]:
        part.bfloat16()
    if half == "vision":
        model.projector.bfloat16()
        model.own_projectors.bfloat16()
    batch = batch_of(model)
    output = model(**batch.model_inputs(), record=True, use_cache=False)
    stream = {"llm": model.get_input_embeddings().weight.dtype, "vit": model.vision_tower.tower.dtype}
    assert [t.added.dtype for t in output.record] == [stream[t.injection.host.value] for t in output.record]
    expected = plain(**batch.model_inputs(), use_cache=False)
    full = expected.logits[batch.attention_mask]
    assert (output.logits.float()[batch.attention_mask] - full).abs().max() < 0.1 * full.abs().max()
    output.loss.backward()
    expected.loss.backward()
    for (key, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if found.requires_grad:
            assert found.grad.dtype is found.dtype, key
            size = wanted.grad.norm()
            assert (found.grad.float() - wanted.grad).norm() < 0.2 * size + 1e-4, key


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv", "long_context"])
def test_nothing_of_a_frozen_tower_is_kept_for_a_backward_pass(name: str) -> None:
    model = tiny_model(PLANS[name])
    model.vision_tower.requires_grad_(False)
    features: list[Tensor] = []
    model.vision_tower.register_forward_hook(lambda *args: features.extend(args[2]))
    kept: list[tuple[int, ...]] = []
    inputs = batch_of(model).model_inputs()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoded = model.encode(*(inputs[key] for key in ("views", "vit_rows", "sequence_rows", "group_rows")))
    assert features
    assert all(each.grad_fn is None and not each.requires_grad for each in features)
    assert all(each.requires_grad for each in encoded if each.numel()), "the projector learns"
    with_class_token = 4 * 4 + 1
    assert kept
    assert not [shape for shape in kept if with_class_token in shape], "activations of the tower's blocks"
    model.projector.requires_grad_(False)
    encoded = model.encode(*(inputs[key] for key in ("views", "vit_rows", "sequence_rows", "group_rows")))
    assert not any(each.requires_grad for each in encoded)


# What runs, whatever a batch holds


def unit_calls(model: DeepStackForConditionalGeneration, inputs: dict[str, Any]) -> list[int]:
    """The units that gather their weights, in the order in which they are called."""
    called: list[int] = []
    each = units(model)
    handles = [u.register_forward_pre_hook(lambda *_, n=number: called.append(n)) for number, u in enumerate(each)]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return called


CALLING = [  # every way of reading views: separate ones, in one pass, by taps, by one projector, by two, by one each
    *("hd_and_v", "deepstack_vit", "channels", "hires_local", "one_pass_unshared_string", "hd_unshared"),
    *("taps_unshared_gated", "granite_shuffled", "merger_of_details", "only_global_features", "spatial_string"),
]


@pytest.mark.parametrize("name", CALLING)
def test_every_batch_calls_the_same_units_in_the_same_order(name: str) -> None:
    """A process that calls one more than another gathers weights that nobody sends."""
    model = model_of(ARMS[name])
    small = ([1, 63, 2], [picture(7, 9, 9)])
    mixes = [[TEXT], [TEXT, TEXT], [ONE], [TWO], [WIDE, small], [TEXT, ONE, TWO], [small] * 3]
    with torch.no_grad():
        found = [unit_calls(model, batch_for(model, rows).model_inputs()) for rows in mixes]
        packed = collated(model, [samples_of(model, [TEXT, ONE, TWO])]).training_inputs()
        found.append(unit_calls(model, packed))
    assert all(calls == found[0] for calls in found), found
    tower = units(model).index(model.vision_tower)
    assert Counter(found[0])[tower] == 1, "one encoder call a step"
    never = set(range(len(units(model)))) - set(found[0])
    reached = len(model.vision_tower.tower.blocks) - model.plan.vit_layers
    assert len(never) == reached, "blocks behind the tapped one, and nothing else"


def test_a_run_is_spread_by_copies_and_by_shares_of_weights_and_by_nothing_else() -> None:
    """Nothing cuts a row, a layer or a stream. Whoever adds what does finds in docs/reliability.md how it breaks."""
    assert {spread.name for spread in Spread} == {"single", "ddp", "fsdp", "fsdp_hybrid"}
    strategies = Path(__file__).parents[2] / "conf" / "strategy"
    assert {file.stem for file in strategies.glob("*.yaml")} == {spread.name for spread in Spread}


# Places


@pytest.mark.parametrize("name", PLANS)
def test_groups_are_an_axis_of_their_own_as_wide_as_the_text(name: str) -> None:
    """Elsewhere they stand side by side in one row, which is then as wide as there are levels."""
    model = tiny_model(PLANS[name])
    inputs = batch_of(model).model_inputs()
    visual = {key: inputs[key] for key in ("views", "vit_rows", "sequence_rows", "group_rows")}
    text, groups = model.encode(**visual)
    width = model.language_model.get_input_embeddings().embedding_dim
    slots = int(inputs["token_index"].max()) + 1
    assert text.shape == (slots, width)
    assert groups.shape == (len(visual["group_rows"]), slots, width)


def test_an_index_of_another_shape_than_the_text_is_refused() -> None:
    """(1, t) and (t, 1) would spread over every row in silence."""
    model = tiny_model(PLANS["deepstack_l"])
    batch = batch_of(model, [ONE, ONE])
    inputs = batch.model_inputs()
    forward = inspect.unwrap(type(model).forward)  # as it runs outside of tests, which check every axis before
    for index in (batch.token_index[:1], batch.token_index[:, :1], batch.token_index.T, batch.token_index[0]):
        with pytest.raises(ValueError, match=r"token_index is \[.*input_ids \[2, 21\]"):
            forward(model, **{**inputs, "token_index": index})


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv", "long_context"])
def test_images_move_with_their_rows_and_matter_where_they_stand(name: str) -> None:
    model = tiny_model(PLANS[name])
    rows = [TEXT, ONE, TWO, ([1, 40, 63, 41, 63, 42, 2], [picture(8, 64, 64), picture(9, 64, 64)])]

    def answers(rows: list) -> list[Tensor]:
        batch = batch_of(model, rows)
        with torch.no_grad():
            logits = model(**batch.model_inputs()).logits
        return [row[mask] for row, mask in zip(logits, batch.attention_mask, strict=True)]

    before, order = answers(rows), [3, 1, 0, 2]
    for place, found in zip(order, answers([rows[place] for place in order]), strict=True):
        torch.testing.assert_close(found, before[place], atol=1e-5, rtol=1e-5)
    ids, (first, second) = rows[3]
    swapped = answers([*rows[:3], (ids, [second, first])])
    for place in range(3):
        assert torch.equal(swapped[place], before[place])
    image = batch_of(model, [rows[3]]).token_index[0] >= 0
    assert torch.equal(swapped[3][:2], before[3][:2]), "what stands before the images"
    assert (swapped[3] - before[3])[image].abs().amax(-1).min() > 1e-3, "at each of their positions"


def test_taps_in_any_order_reach_the_layers_that_they_were_listed_for() -> None:
    """Elsewhere they are sorted in silence: [2, 1] would be [1, 2] with other mergers."""
    sorted_, listed = model_of(Arm(TAPS)), model_of(Arm(replace(TAPS, taps=[2, 1])))
    named = dict(sorted_.named_parameters())
    with torch.no_grad():
        for name, parameter in listed.named_parameters():
            parameter.copy_(named[name])
    assert [(i.dealt, i.layer) for i in listed.plan.injections] == [((Source.tap, 0), 1), ((Source.tap, 1), 2)]
    inputs = batch_for(listed, [ONE]).model_inputs()
    with torch.no_grad():
        features = [model.vision_tower(inputs["views"], inputs["vit_rows"]) for model in (sorted_, listed)]
        output = listed(**inputs, record=True)
    assert torch.equal(features[0][1], features[1][2])
    assert torch.equal(features[0][2], features[1][1])
    for number, trace in enumerate(output.record):
        with torch.no_grad():
            expected = listed.own_projectors[f"tap_{number}"](features[1][1 + number]).flatten(0, 1)
        torch.testing.assert_close(trace.added[trace.touched], expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("source", [Source.tiles, Source.tap, Source.global_view])
def test_any_number_of_injections_is_the_oracles(source: Source, count: int) -> None:
    plan = {
        Source.tiles: ModelConfig(name="t", tiles=6, groups=count),
        Source.tap: ModelConfig(name="p", tiles=0, source=source, taps=[0, 3, 1, 2, -1][:count], groups=count),
        Source.global_view: ModelConfig(name="g", tiles=0, source=source, groups=count),
    }[source]
    model = model_of(Arm(plan))
    assert len(model.plan.injections) == count
    assert_like_the_oracle(model, MIXED, PadSide.left)


# State


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv"])
def test_a_forward_inside_another_disturbs_neither(name: str) -> None:
    model = tiny_model(PLANS[name])
    outer, inner = batch_of(model, [TWO]).model_inputs(), batch_of(model, [WIDE, TEXT]).model_inputs()
    text = {key: inner[key] for key in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 63, 5)
    with torch.no_grad():
        # Text first, before there is anything that could be left behind.
        expected = [model(**inputs).logits for inputs in (text, inner, outer)][::-1]
        found: list[Tensor] = []

        def nested(*_: Any) -> None:
            if not found:
                found.append(torch.empty(0))  # or it would begin again inside itself
                found.extend(model(**inputs).logits for inputs in (inner, text))

        # Between two injections of each host.
        for block in (decoder_layers(model.language_model)[2], model.vision_tower.tower.blocks[1]):
            handle = block.register_forward_hook(nested)
            found.clear()
            assert torch.equal(model(**outer).logits, expected[0])
            assert torch.equal(found[1], expected[1])
            assert torch.equal(found[2], expected[2])
            handle.remove()


@pytest.mark.parametrize("name", ["deepstack_l", "deepstack_lv"])
def test_a_model_that_answered_text_first_takes_images_after_it_was_cast(name: str) -> None:
    model, fresh = tiny_model(PLANS[name]), tiny_model(PLANS[name]).bfloat16()
    inputs = batch_of(model).model_inputs()
    with torch.no_grad():
        model(**batch_of(model, [TEXT]).model_inputs())
        model(input_ids=torch.tensor([[1, 5, 6]]))
        model.bfloat16()
        model(input_ids=torch.tensor([[1, 5, 6]]))
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
        again = model.float()(**inputs).logits
    assert again.dtype is torch.float32


# Files


@pytest.mark.parametrize("tied", [False, True])
def test_whether_the_head_is_the_embedding_is_written_at_both_levels(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(PLANS["deepstack_l"], tied=tied)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["tie_word_embeddings"], values["text_config"]["tie_word_embeddings"]) == (tied, tied)
    loaded = DeepStackForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    batch = batch_of(model)
    assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)
