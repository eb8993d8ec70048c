"""Every published ablation against the oracle: forward, backward, generate, save, and cut in the middle of an image."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ablations import ARMS, Arm, L, assert_close_for_its_size, batch_for, collated, model_of, samples_of
from oracle import forward_slowly
from tiny import MIXED, picture, prompts
from torch import Tensor

from deepstack_pl.batch import PadSide
from deepstack_pl.language.config import TooLong
from deepstack_pl.multimodal.config import Sharing
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import InjectionConfig, ModelConfig, Sequence, Source

SHAPES = [*MIXED, ([1, 63, 5, 2], [picture(5, 50, 40)])]  # one that a letterbox leaves black above and below
LONG_ROWS = [  # text alone, one image, two images that may be cut both
    ([1, 5, 6, 7, 8, 9, 2], []),
    ([1, 63, 11, 12, 13, 2], [picture(0, 64, 64)]),
    ([1, 20, 63, 21, 22, 63, 23, 24, 2], [picture(1, 90, 30), picture(2, 40, 50)]),
]


def slowly(model: DeepStackForConditionalGeneration, rows: list, max_length: int | None = None) -> Tensor:
    return torch.cat([forward_slowly(model, ids, images, max_length)[0] for ids, images in rows])


@pytest.mark.parametrize("name", ARMS)
def test_a_mixed_batch_equals_the_oracle_in_logits_on_both_sides_and_in_gradients(name: str) -> None:
    model = model_of(ARMS[name])
    slow = copy.deepcopy(model)
    expected = slowly(slow, SHAPES)
    left = batch_for(model, SHAPES, PadSide.left)
    with torch.no_grad():
        assert_close_for_its_size(model(**left.model_inputs()).logits[left.attention_mask], expected)
    batch = batch_for(model, SHAPES)
    logits = model(**batch.model_inputs()).logits[batch.attention_mask]
    assert_close_for_its_size(logits, expected)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, fast), naive in zip(model.named_parameters(), slow.parameters(), strict=True):
        if fast.requires_grad:
            assert fast.grad is not None, key
            grad = torch.zeros_like(fast) if naive.grad is None else naive.grad  # a projector that sees no view
            torch.testing.assert_close(fast.grad, grad, atol=1e-3, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.before])
def test_the_setting_that_an_ablation_tries_changes_the_logits(name: str) -> None:
    arm = ARMS[name]
    model, before = model_of(arm), model_of(replace(arm, plan=replace(arm.plan, **(arm.before or {}))))
    with torch.no_grad():
        found, other = (each(**batch_for(each, MIXED[1:3]).model_inputs()).logits for each in (model, before))
    assert found.shape != other.shape or (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARMS)
def test_every_group_that_is_injected_and_the_tokens_of_the_sequence_change_the_logits(name: str) -> None:
    model = model_of(ARMS[name])
    batch = batch_for(model, MIXED[1:2])
    with torch.no_grad():
        expected = model(**batch.model_inputs()).logits
        for table in ("group_rows", "vit_rows", "sequence_rows"):
            rows = getattr(batch, table)
            step = 7 if table == "sequence_rows" else 1  # each group, but for brevity not each token
            for number in range(0, len(rows), step):
                if (rows[number] == -1).all():  # a slot that is blank, or that a small grid leaves at zero
                    continue
                zeroed = rows.clone()
                zeroed[number] = -1
                found = model(**{**batch.model_inputs(), table: zeroed}).logits
                assert (found - expected).abs().max() > 1e-4, (table, number)


@pytest.mark.parametrize("name", ARMS)
def test_a_batch_of_text_alone_leaves_no_gradient_absent_and_adds_exactly_zero(name: str) -> None:
    model = model_of(ARMS[name])
    batch = batch_for(model, MIXED[:1])
    assert len(batch.views) == 1
    model(**batch.model_inputs()).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert key.startswith("language_model") or not parameter.grad.any(), key


@pytest.mark.parametrize("name", ARMS)
def test_greedy_with_cache_equals_without_and_each_row_alone(name: str) -> None:
    model = model_of(ARMS[name])
    batch = batch_for(model, side=PadSide.left)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**prompts(batch), **arguments)
    assert torch.equal(cached, model.generate(**prompts(batch), **arguments, use_cache=False))
    for row, case in enumerate(MIXED):
        alone = batch_for(model, [case], PadSide.left)
        new = model.generate(**prompts(alone), **arguments)[0, alone.input_ids.shape[1] :]
        assert torch.equal(cached[row, batch.input_ids.shape[1] :], new)


@pytest.mark.parametrize("name", ARMS)
def test_a_saved_and_loaded_model_has_the_same_plan_and_logits(name: str, tmp_path: Path) -> None:
    model = model_of(ARMS[name], seed=3)
    model.save_pretrained(tmp_path)
    loaded = DeepStackForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.plan == model.plan
    assert loaded.plan.digest == model.plan.digest
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)


@pytest.mark.parametrize("side", list(PadSide))
@pytest.mark.parametrize(
    ("name", "max_length"),
    # In the first view; in tiles; at a newline (16 + 9 - 1 of a row) and after it; in zeros; in the second image.
    [
        ("1d", 9),
        ("hd", 7),
        ("hd", 26),
        ("hd", 27),
        ("hd", 40),
        ("string_withglobal", 60),
        ("2d_scaledown", 10),
        ("channels", 10),
        ("hd_and_v", 30),
        ("only_global_features", 22),
        ("hires_local", 25),
    ],
)
def test_a_sample_cut_in_the_middle_of_an_image_equals_the_oracle_cut_there(
    name: str, max_length: int, side: PadSide
) -> None:
    model = model_of(ARMS[name])
    cut = samples_of(model, LONG_ROWS, max_length, TooLong.cut)
    full = samples_of(model, LONG_ROWS)
    assert [s.cut for s in cut] == [max(0, len(f.input_ids) - max_length) for f in full]
    assert any(s.cut and s.token_index[-1] >= 0 for s in cut), "no cut fell into an image"
    for each, whole in zip(cut, full, strict=True):
        for field in ("input_ids", "labels", "token_index"):
            assert torch.equal(getattr(each, field), getattr(whole, field)[:max_length])
    batch = collated(model, cut, side)
    assert batch.cuts == [s.cut for s in cut]
    with torch.no_grad():
        found = model(**batch.model_inputs()).logits[batch.attention_mask]
        assert_close_for_its_size(found, slowly(model, LONG_ROWS, max_length))


@pytest.mark.parametrize("name", ["hd", "string_withglobal", "channels", "hd_and_v", "hires_local"])
@pytest.mark.parametrize("max_length", [3, 10, 25, 40, 60, 100])
def test_where_text_alone_is_cut_images_stay_whole_and_the_rest_equals_the_oracle(name: str, max_length: int) -> None:
    model = model_of(ARMS[name])
    cut, full = samples_of(model, LONG_ROWS, max_length, TooLong.cut_text), samples_of(model, LONG_ROWS)
    for each, whole, (_, images) in zip(cut, full, LONG_ROWS, strict=True):
        kept = len(each.input_ids)
        assert kept + each.cut == len(whole.input_ids)
        assert kept <= max_length
        assert torch.equal(each.input_ids, whole.input_ids[:kept])
        assert (each.token_index >= 0).sum() == len(each.sequence_rows), "an image is there whole or not at all"
        assert each.images <= len(images)
        if kept < max_length and each.cut:
            assert whole.token_index[kept] >= 0, "less than max_length is left only where an image did not fit"
    with torch.no_grad():
        found = model(**collated(model, cut).model_inputs()).logits
        for row, whole, each in zip(found, full, cut, strict=True):
            length = len(each.input_ids)
            alone = model(**collated(model, [whole]).model_inputs()).logits[0, :length]
            assert_close_for_its_size(row[:length], alone)


def test_a_sample_that_is_too_long_is_refused_by_name_with_the_remedy_unless_cutting_was_asked_for() -> None:
    told = r"sample 'row 1': \d+ positions, \d+ of them visual, but llm.max_length is 40.*llm.too_long=cut_text"
    with pytest.raises(ValueError, match=told):
        samples_of(model_of(ARMS["hd"]), LONG_ROWS, 40)


def test_two_projectors_start_apart_and_serve_global_views_and_all_others() -> None:
    model = model_of(replace(ARMS["hd"], sharing=Sharing.global_and_tiles))
    assert not torch.equal(model.projector.global_view[0].weight, model.projector.tiles[0].weight)
    batch = batch_for(model, MIXED[1:2])
    with torch.no_grad():
        features = model.vision_tower(batch.views, batch.vit_rows)[0]
        tokens = model.projector(features, 1)
        model.projector.tiles[0].weight.add_(1.0)
        moved = model.projector(features, 1)
    changed = (tokens != moved).flatten(1).any(1)
    assert changed.tolist() == [False] + [True] * (len(batch.views) - 1)


def test_two_projectors_for_features_projected_as_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"projector.sharing=global_and_tiles with model.sequence=channels"):
        model_of(replace(ARMS["channels"], sharing=Sharing.global_and_tiles))


def test_pooling_that_leaves_a_remainder_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"model.pooling=3 does not divide a view's 4 patches a side"):
        model_of(replace(ARMS["2d_scaledown"], plan=replace(L, pooling=3)))


def test_only_plans_with_newlines_own_one() -> None:
    assert model_of(ARMS["hd"]).image_newline is not None
    assert model_of(ARMS["1d"]).image_newline is None


TAP = InjectionConfig(layer=5, source=Source.tap)


def test_two_projectors_where_global_views_leave_by_taps_alone_are_refused() -> None:
    plan = ModelConfig(name="t", sequence=Sequence.blank, injections=[TAP], taps=[-1])
    with pytest.raises(ValueError, match=r"no global views reach the LLM, and their projector would learn nothing"):
        model_of(Arm(plan, Sharing.global_and_tiles))


def test_a_tap_beside_shared_groups_costs_no_second_projection() -> None:
    model = model_of(Arm(replace(ARMS["per_injection"].plan, taps=[1], injections=[TAP])))
    calls: list[int] = []
    model.projector.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    batch = batch_for(model, MIXED[1:2])
    with torch.no_grad():
        model(**batch.model_inputs())
    assert calls == [5]
