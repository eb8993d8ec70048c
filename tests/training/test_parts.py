"""Freezing, the trainable-parts table and the optimiser's groups."""

import pytest
from rich.console import Console
from small_run import FROZEN, PRETRAIN, SCRATCH, STACKED, small_model

from deepstack_pl.multimodal.build import parts
from deepstack_pl.stacking.config import ModelConfig, Operator
from deepstack_pl.training.config import PartConfig, StageConfig
from deepstack_pl.training.parts import apply_stage, optimizer_groups, shortest_prefixes

GATED = ModelConfig(name="gated", operator=Operator.gated_add)


def test_only_the_parts_that_the_stage_trains_require_gradients():
    model = small_model()
    apply_stage(model, PRETRAIN)
    learns = {part: {p.requires_grad for _, p in named} for part, named in parts(model).items()}
    assert learns == {"vision": {False}, "projector": {True}, "llm": {False}}


def test_a_later_stage_thaws_what_an_earlier_one_froze():
    model = small_model()
    apply_stage(model, PRETRAIN)
    table = apply_stage(model, SCRATCH)
    assert [row.frozen for row in table.rows] == [table.rows[0].unreachable, 0, 0]


def test_what_the_plan_cannot_reach_stays_frozen_and_is_listed_by_prefix():
    model = small_model()
    table = apply_stage(model, SCRATCH)
    vision = table.rows[0]
    assert vision.unreachable == vision.frozen == sum(model.get_parameter(n).numel() for n in model.unreachable()) > 0
    assert vision.unreachable_names == (
        "vision_tower.tower.visual.transformer.resblocks.3",
        "vision_tower.tower.visual.ln_post",
    )
    assert not any(model.get_parameter(name).requires_grad for name in model.unreachable())


def test_the_table_adds_up_and_reads_the_same_everywhere():
    table = apply_stage(small_model(), PRETRAIN)
    model = small_model()
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.trained == sum(p.numel() for p in model.projector.parameters())
    console = Console(width=140, record=True, file=None)
    with console.capture() as shown:
        console.print(table.table())
    for text in (shown.get(), table.markdown()):
        assert f"{table.trained:,}" in text
        assert "resblocks.3" in text
        assert "frozen" in text
    assert table.to_dict()["parts"][1]["lr"] == PRETRAIN.projector.lr
    assert table.to_dict()["parts"][0]["lr"] is None


def test_the_table_needs_no_weights():
    real, meta = apply_stage(small_model(), SCRATCH), apply_stage(small_model(device="meta"), SCRATCH)
    assert real == meta


def test_a_stage_that_trains_nothing_is_refused():
    idle = StageConfig(name="idle", vision=FROZEN, projector=FROZEN, llm=FROZEN)
    with pytest.raises(ValueError, match=r"stage=idle trains nothing.*stage\.llm\.trained.*Set at least one to true"):
        apply_stage(small_model(), idle)


def test_a_trained_part_without_a_learning_rate_is_refused():
    stage = StageConfig(name="odd", llm=PartConfig(lr=0.0))
    with pytest.raises(ValueError, match=r"stage\.llm\.lr=0\.0.*Raise it, or set stage\.llm\.trained=false"):
        apply_stage(small_model(), stage)


def test_biases_norms_and_gates_are_never_decayed_and_matrices_always():
    model = small_model(GATED)
    stage = StageConfig(
        name="rates", vision=PartConfig(lr=1e-4), projector=PartConfig(lr=2e-4), llm=PartConfig(lr=3e-4)
    )
    apply_stage(model, stage)
    groups = optimizer_groups(model, stage, weight_decay=0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith("bias") or "norm" in name or "ln_" in name or name.startswith("gates.")
            assert (id(parameter) in decayed) == (not plain and parameter.ndim > 1), name
    assert {(g["part"], g["lr"]) for g in groups} == {("vision", 1e-4), ("projector", 2e-4), ("llm", 3e-4)}
    assert any(model.gates["llm"] is p for g in groups if g["part"] == "projector" for p in g["params"])


def test_the_groups_hold_every_trained_parameter_once():
    model = small_model(STACKED)
    apply_stage(model, SCRATCH)
    held = [id(p) for g in optimizer_groups(model, SCRATCH, 0.1) for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_prefixes_cover_exactly_what_was_chosen():
    names = ["a.0.w", "a.0.b", "a.1.w", "a.10.w", "c"]
    assert shortest_prefixes(names, {"a.1.w", "c"}) == ["a.1", "c"]
    assert shortest_prefixes(names, {"a.0.w"}) == ["a.0.w"]
    assert shortest_prefixes(names, set(names)) == ["a", "c"]
