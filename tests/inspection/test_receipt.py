"""Receipts: sound models pass, and every way of breaking an injection is caught and named."""

import pytest
import torch
from rich.console import Console
from small_run import FROZEN, LLM, STACKED, VISION, small_model, small_processor
from spoiling import broken, failure

from deepstack_pl.inspection.receipt import Receipt, take_receipt
from deepstack_pl.language.host import InjectionHook, decoder_layers
from deepstack_pl.language.template import TEMPLATES
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import (
    Collisions,
    Dealing,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Operator,
    Overflow,
    Sequence,
)
from deepstack_pl.stacking.plan import Injection
from deepstack_pl.training.config import StageConfig
from deepstack_pl.training.parts import apply_stage

SOUND = {
    "l": STACKED,
    "l_from_0": ModelConfig(name="l0", start_layer=0),
    "l_to_the_last_layer": ModelConfig(name="last", start_layer=2),
    "v": ModelConfig(name="v", host=Host.vit, start_layer=0),
    "v_into_the_feature": ModelConfig(name="feature", host=Host.vit, groups=1, start_layer=3),
    "lv": ModelConfig(name="lv", injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)]),
    "gated_l": ModelConfig(name="gated", operator=Operator.gated_add),
    "gated_v": ModelConfig(name="gated_v", host=Host.vit, start_layer=0, operator=Operator.gated_add),
    "with_tiles_in_the_text": ModelConfig(name="both", sequence=Sequence.global_and_tiles),
    "shared_group": ModelConfig(name="shared", groups=2, injections=[InjectionConfig(group=0, layer=4)]),
    "summed": ModelConfig(
        name="summed", collisions=Collisions.sum, injections=[InjectionConfig(group=3, layer=1)], groups=2
    ),
    "five_tiles_1d": ModelConfig(name="five", tiles=5, groups=5, dealing=Dealing.strided_1d),
    "square": ModelConfig(name="square", tiles=5, grid=GridRule.square),
    "tiles": ModelConfig(name="tiles", dealing=Dealing.tiles, interval=1),
}


def receipt_of(config: ModelConfig = STACKED) -> Receipt:
    return take_receipt(small_model(config), small_processor(config))


@pytest.mark.parametrize("config", SOUND.values(), ids=SOUND)
def test_a_sound_model_passes(config):
    receipt = receipt_of(config)
    assert receipt.ok, receipt.to_dict()
    assert [row.injection for row in receipt.rows] == list(small_processor(config).plan.injections)
    for row in receipt.rows:
        assert row.expected == 3 * 16
        assert row.touched == (0 if row.injection.operator is Operator.gated_add else row.expected)
        assert row.gradient > 0
        assert row.logit_change > 0
    receipt.require()


def test_an_empty_plan_gives_an_empty_receipt_that_says_so():
    receipt = receipt_of(ModelConfig(name="baseline", tiles=0, groups=0))
    assert receipt.ok
    assert receipt.rows == ()
    assert "no injections: nothing is stacked" in receipt.markdown()
    assert receipt.to_dict()["notes"] == ["no injections: nothing is stacked"]


def test_dropped_injections_and_idle_groups_are_listed():
    receipt = receipt_of(ModelConfig(name="deep", start_layer=4, groups=3, overflow=Overflow.drop))
    assert receipt.ok
    assert receipt.notes() == [
        "dropped beyond the depth: group 2 -> llm layer 6",
        "dealt but injected nowhere: groups 2, 3",
    ]


def test_the_receipt_reads_the_same_everywhere():
    receipt = receipt_of(SOUND["gated_l"])
    console = Console(width=160)
    with console.capture() as shown:
        console.print(receipt.table())
    for text in (shown.get(), receipt.markdown(), str(receipt.to_dict())):
        assert all(str(row.injection) in text for row in receipt.rows)
        assert "proven by its own gradient" in text


def test_everything_frozen_but_the_projector_can_still_be_proven():
    model = small_model()
    apply_stage(model, StageConfig(name="pretrain", vision=FROZEN, llm=FROZEN))
    assert take_receipt(model, small_processor()).ok


@pytest.mark.parametrize("name", ["lv", "gated_l"])
def test_a_model_that_learns_nothing_at_all_can_still_be_proven(name):
    model = small_model(SOUND[name]).requires_grad_(False)
    assert take_receipt(model, small_processor(SOUND[name])).ok
    assert not any(p.requires_grad for p in model.parameters())


def test_an_open_gate_is_proven_like_an_addition():
    model = small_model(SOUND["gated_l"])
    with torch.no_grad():
        model.gates["llm"][1:] = 0.3
    rows = take_receipt(model, small_processor(SOUND["gated_l"])).rows
    assert all(row.ok for row in rows)
    assert [row.touched for row in rows] == [0, 48, 48, 48]


def test_taking_a_receipt_leaves_no_trace():
    model = small_model(SOUND["gated_l"]).train()
    model.projector.eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    take_receipt(model, small_processor(SOUND["gated_l"]))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("name", ["l", "lv", "gated_l", "gated_v"])
def test_a_model_in_bfloat16_passes_too(name):
    receipt = take_receipt(small_model(SOUND[name]).bfloat16(), small_processor(SOUND[name]))
    assert receipt.ok, receipt.to_dict()


def test_a_template_that_writes_no_text_alone_is_proven_without_a_text_only_row():
    processor = small_processor()
    processor.template = TEMPLATES["plain"]
    receipt = take_receipt(small_model(), processor)
    assert receipt.ok, receipt.to_dict()
    assert [row.expected for row in receipt.rows] == [48] * 4


def test_images_longer_than_a_training_sample_may_be_are_no_obstacle():
    plan = build_plan(STACKED, LLM, VISION)
    tokenizer = small_processor().tokenizer
    tight = DeepStackProcessor(tokenizer, plan=plan, vision=VISION, template="shipped", max_length=24)
    assert take_receipt(small_model(), tight).ok
    assert tight.max_length == 24


# --- broken on purpose ---


def hook_of(model, layer: int) -> InjectionHook:
    (hook,) = (
        h
        for h in decoder_layers(model.language_model)[layer]._forward_pre_hooks.values()
        if isinstance(h, InjectionHook)
    )
    return hook


def test_a_lost_hook_is_named():
    model = small_model()
    hook_of(model, 2).places = []
    message = failure(model)
    assert "group 1 -> llm layer 2: it left no record" in message
    assert "layer 3" not in message


def test_a_hook_at_the_wrong_layer_is_named():
    model = small_model()
    hook_of(model, 5).places, hook_of(model, 2).places = hook_of(model, 2).places, []
    assert "group 1 -> llm layer 2: it takes effect at layer 5, not at layer 2" in failure(model)


def test_a_tower_that_injects_one_block_late_is_named():
    config = ModelConfig(name="v", host=Host.vit, start_layer=0, groups=2)
    model = small_model(config)
    late = build_plan(ModelConfig(name="v", host=Host.vit, start_layer=1, groups=2), LLM, VISION)
    honest = model.vision_tower.plan

    class Late:
        """The plan, told wrongly to the tower: its injections one block later, under their own names."""

        vit_layers, encoding = honest.vit_layers, honest.encoding
        tiles_reach_feature, taps = honest.tiles_reach_feature, honest.taps

        def at(self, host):
            return {layer + 1: injections for layer, injections in honest.at(host).items()}

        groups, gated = late.groups, late.gated

    model.vision_tower.plan = Late()
    message = failure(model, config=config)
    assert "group 0 -> vit layer 0: it takes effect at layer 1, not at layer 0" in message
    assert "group 1 -> vit layer 1: it takes effect at layer 2, not at layer 1" in message


def test_positions_one_off_are_named():
    def shift(batch):
        batch.token_index = batch.token_index.roll(1, dims=1)

    message = failure(small_model(), broken(shift))
    assert (
        "group 0 -> llm layer 1: it misses 2 of its images' 48 positions and touches 2 that are not theirs" in message
    )


def test_a_text_only_row_that_is_touched_is_named():
    def touch(batch):
        batch.token_index[0, 0] = 0

    assert "it misses 0 of its images' 48 positions and touches 1 that are not theirs" in failure(
        small_model(), broken(touch)
    )


@pytest.mark.parametrize("host", list(Host))
def test_features_of_another_image_are_named(host):
    config = STACKED if host is Host.llm else SOUND["v"]

    def swap(batch):
        rows = batch.group_rows if host is Host.llm else batch.vit_rows
        rows[2] = rows[2].roll(16)

    message = failure(small_model(config), broken(swap, config))
    assert f"group 2 -> {host.value} layer {3 if host is Host.llm else 2}" in message
    assert "wrong image" in message
    assert "group 1" not in message


def test_global_view_tokens_in_place_of_tiles_are_named():
    def globals_only(batch):
        batch.group_rows[0] = batch.sequence_rows

    message = failure(small_model(), broken(globals_only))
    assert (
        "group 0 -> llm layer 1: what it adds at image 0's positions does not depend on that image's tiles" in message
    )


def test_a_group_that_is_never_filled_is_named():
    def empty(batch):
        batch.group_rows[3] = -1

    message = failure(small_model(), broken(empty))
    assert "group 3 -> llm layer 4: it misses 48 of its images' 48 positions" in message
    assert "does not change a single logit" in message


@pytest.mark.parametrize("name", ["l", "v", "gated_l"])
def test_detached_features_are_named(name, monkeypatch):
    from deepstack_pl.stacking import injection

    gather = injection.gather
    # The rows of the text sequence alone have one axis.
    monkeypatch.setattr(
        injection, "gather", lambda f, rows: gather(f, rows).detach() if rows.ndim == 2 else gather(f, rows)
    )
    message = failure(small_model(SOUND[name]), config=SOUND[name])
    assert message.count("its features are detached") == 4


def test_a_gate_that_cannot_open_is_named():
    model = small_model(SOUND["gated_l"])
    scales = type(model)._scales
    model._scales = lambda host: None if scales(model, host) is None else scales(model, host).detach()
    message = failure(model, config=SOUND["gated_l"])
    assert "its gate is closed and has no gradient: it would never open" in message


def test_an_injection_that_is_not_in_the_plan_is_named():
    model = small_model()
    extra = Injection(Host.llm, 5, 0)
    hook_of(model, 5).places = [(extra, 0, None)]
    assert "group 0 -> llm layer 5: it happened, but the plan does not say so" in failure(model)
