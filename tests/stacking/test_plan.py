from dataclasses import replace

import pytest

from deepstack_pl.stacking.config import (
    Collisions,
    Encoding,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Operator,
    Order,
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.plan import Injection, Plan


def build(config: ModelConfig, llm_layers: int = 12, vit_layers: int = 4) -> Plan:
    return Plan.build(config, llm_layers=llm_layers, vit_layers=vit_layers)


L = ModelConfig(name="deepstack_l")


def test_defaults_are_the_published_ones() -> None:
    assert [(i.layer, i.group) for i in build(L).injections] == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_overflow_is_refused_with_both_numbers_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="reach layer 36") as error:
        build(replace(L, start_layer=30, interval=2), llm_layers=32)
    assert str(error.value) == (
        "4 groups from layer 30, one every 2, reach layer 36, but the LLM has 32 layers. "
        "Lower `model.start_layer`, `model.interval` or `model.groups`."
    )


def test_overflow_is_dropped_and_listed_only_where_the_plan_says_so() -> None:
    plan = build(replace(L, start_layer=10, overflow=Overflow.drop))
    assert [i.layer for i in plan.injections] == [10, 11]
    assert [i.layer for i in plan.dropped] == [12, 13]
    assert "dropped beyond the depth: group 3 -> llm layer 13" in plan.draw()


def test_the_selected_feature_itself_is_a_legal_place_in_a_tower() -> None:
    config = replace(L, host=Host.vit, start_layer=1)
    assert [i.layer for i in build(config).injections] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="feature is read after 4 blocks, so 4 is the last place"):
        build(replace(config, start_layer=2))


def test_two_injections_on_one_layer_are_refused_unless_summed_on_purpose() -> None:
    config = replace(L, injections=[InjectionConfig(group=0, layer=3)])
    with pytest.raises(ValueError, match=r"meet on one layer.*model\.collisions=sum"):
        build(config)
    assert len(build(replace(config, collisions=Collisions.sum)).at(Host.llm)[3]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "4 tiles \\(best_fit\\) deal at most 4 groups"),
        ({"tiles": 5, "groups": 5, "grid": GridRule.square}, "5 tiles \\(square\\) deal at most 4 groups"),
        ({"tiles": 1, "groups": 0}, "no grid of one tile"),
        ({"tiles": -1}, "cannot be negative"),
        ({"interval": 0}, r"model\.interval=0 adds all 4 groups before layer 1.*model\.collisions=sum"),
        ({"tiles": 0, "groups": 0, "sequence": Sequence.global_and_tiles}, "needs tiles"),
        ({"injections": [InjectionConfig(group=4, layer=8)]}, "deal groups 0 to 3"),
        ({"injections": [InjectionConfig(group=0, layer=12)]}, "the LLM has 12 layers \\(0 to 11\\)"),
        ({"injections": [InjectionConfig(group=0, layer=-1)]}, "layers count from 0"),
        ({"injections": [InjectionConfig(group=0, layer=1)], "collisions": Collisions.sum}, "more than once"),
    ],
)
def test_impossible_plans_are_refused_in_a_sentence(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(replace(L, **change))


STRING = replace(L, groups=0, sequence=Sequence.global_and_tiles)
DETAIL = replace(L, detail=2, source=Source.detail)
AGAIN = InjectionConfig(source=Source.global_view, layer=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(L, detail=0), r"model\.detail=0.*must be at least 1"),
        (replace(L, pooling=0), r"model\.pooling=0.*must be at least 1"),
        (replace(L, groups=-1), r"model\.groups=-1.*none can be negative"),
        (replace(L, start_layer=-1), r"model\.start_layer=-1.*none can be negative"),
        (replace(STRING, tiles=0, sequence=Sequence.tiles), "model.sequence=tiles needs tiles"),
        (replace(STRING, tiles=0, sequence=Sequence.channels), "model.sequence=channels needs tiles"),
        (replace(L, order=Order.raster), "model.sequence=global_view has none. Say model.order=by_group"),
        (replace(L, unfilled=Unfilled.zeros), "model.sequence=global_view in model.order=by_group has none"),
        (replace(STRING, order=Order.raster, unfilled=Unfilled.zeros), "in model.order=raster has none"),
        (replace(STRING, newline=Newline.rows), "model.newline=rows ends the mosaic's rows.*Say model.order=raster"),
        (replace(STRING, sequence=Sequence.channels, pooling=2), "model.sequence=channels projects last"),
        (replace(L, tiles=0, groups=0, resize=Resize.letterbox), "model.resize=letterbox with model.tiles=0"),
        (replace(DETAIL, resize=Resize.letterbox), "detail is cut from plain stretches"),
        (replace(L, encoding=Encoding.one_pass), "Say model.tiles=4 model.grid=square model.detail=1"),
        (replace(DETAIL, encoding=Encoding.one_pass, grid=GridRule.square), "model.encoding=one_pass with.*detail=2"),
        (replace(L, tiles=0, groups=0, encoding=Encoding.one_pass, grid=GridRule.square), "model.encoding=one_pass"),
        (replace(L, sequence=Sequence.tiles), "group 0 -> llm layer 1: with model.sequence=tiles no position"),
        (replace(L, sequence=Sequence.channels), "with model.sequence=channels no position in the text"),
        (
            replace(
                L, groups=0, sequence=Sequence.tiles, injections=[InjectionConfig(source=Source.global_view, layer=2)]
            ),
            "global view -> llm layer 2: with model.sequence=tiles no position",
        ),
        (
            replace(L, host=Host.vit, start_layer=0, encoding=Encoding.one_pass, grid=GridRule.square),
            "the tower never sees tiles by themselves",
        ),
        (
            replace(L, groups=0, sequence=Sequence.blank),
            "it would never see the image",
        ),
        (replace(L, host=Host.vit, start_layer=0, sequence=Sequence.blank), "to which the tower adds it, reaches"),
        (
            replace(STRING, order=Order.raster, newline=Newline.rows_and_groups),
            "adds newlines with groups of detail, but none is injected",
        ),
        (replace(DETAIL, groups=5), "model.groups=5, but model.detail=2 deals 4 groups of every view"),
        (replace(DETAIL, host=Host.vit, start_layer=0), "detail is laid out like the text sequence.*it enters the LLM"),
        (replace(DETAIL, sequence=Sequence.blank), "with model.sequence=global_view or global_and_tiles"),
        (
            replace(L, injections=[InjectionConfig(source=Source.detail, layer=8)]),
            "detail group 0 -> llm layer 8: model.detail=1 cuts no detail",
        ),
        (
            replace(L, injections=[InjectionConfig(source=Source.global_view, group=1, layer=8)]),
            "is its group 1, but there is but one global view: groups 0 to 0",
        ),
        (
            replace(DETAIL, injections=[InjectionConfig(source=Source.detail, group=4, layer=8)]),
            "deals groups 0 to 3",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_remedy(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(config)
    assert str(error.value).endswith(".")


def test_a_stored_plan_is_held_to_the_same_rules() -> None:
    values = build(STRING).to_dict() | {"newline": "rows"}
    with pytest.raises(ValueError, match=r"Say model\.order=raster"):
        Plan.from_dict(values)


def test_the_global_view_may_be_stacked_again_more_often_than_there_are_groups() -> None:
    plan = build(replace(L, tiles=0, source=Source.global_view, groups=6))
    assert [(i.layer, i.group, i.source) for i in plan.injections] == [
        (layer, 0, Source.global_view) for layer in range(1, 7)
    ]
    assert plan.groups(Host.llm) == ((Source.global_view, 0),)


def test_context_of_high_definition_is_the_longest_grid_with_its_newlines() -> None:
    """Method A.7: 1 x 4 tiles take 2976 positions, and 25 views are read of 5."""
    config = replace(DETAIL, sequence=Sequence.global_and_tiles, order=Order.raster, newline=Newline.rows_and_groups)
    plan = build(config)
    assert plan.context_tokens(576) == 2976
    assert plan.seen_tokens(576) == 14400
    assert build(replace(config, newline=Newline.none)).context_tokens(576) == 2880


def test_digest_of_a_plan_without_new_settings_is_what_it_was_and_each_setting_changes_it() -> None:
    plain = build(STRING)
    changes = [
        {"unfilled": Unfilled.zeros},
        {"order": Order.raster},
        {"order": Order.raster, "newline": Newline.rows},
        {"resize": Resize.letterbox},
        {"pooling": 2},
        {"detail": 2},
        {"sequence": Sequence.tiles},
        {"grid": GridRule.square},
        {"grid": GridRule.square, "encoding": Encoding.one_pass},
    ]
    digests = [plain.digest, *(build(replace(STRING, **change)).digest for change in changes)]
    assert len(set(digests)) == len(digests)


def test_digest_follows_what_a_plan_does_not_its_name() -> None:
    assert build(L).digest == build(replace(L, name="other")).digest
    explicit = replace(L, groups=0, injections=[InjectionConfig(group=k, layer=k + 1) for k in range(4)])
    assert build(L).digest == build(explicit).digest
    assert build(L).digest != build(replace(L, start_layer=2)).digest
    assert build(L).digest == "c29e15af53a2", "a digest is stored with every run: changing it orphans them"


def test_a_plan_survives_its_own_dictionary() -> None:
    plan = build(replace(L, operator=Operator.gated_add, start_layer=10, overflow=Overflow.drop))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_stored_plan_that_was_edited_is_refused() -> None:
    values = build(L).to_dict()
    values["injections"][3]["layer"] = 50
    with pytest.raises(ValueError, match=r"group 3 -> llm layer 50: layers count from 0, and the LLM has 12 layers"):
        Plan.from_dict(values)


@pytest.mark.parametrize("layer", [1.5, "1", True, None])
def test_a_layer_that_no_layer_is_called_by_is_refused(layer: object) -> None:
    """Between layers 1 and 2 nothing is ever added, and nothing would say so."""
    values = build(L).to_dict()
    values["injections"][0]["layer"] = layer
    with pytest.raises(ValueError, match=rf"injections\[0\]\.layer is {layer!r}, which is no whole number"):
        Plan.from_dict(values)


def test_a_square_grid_counts_the_tiles_it_has() -> None:
    plan = build(replace(L, tiles=5, groups=4, grid=GridRule.square))
    assert plan.idle_groups == ()
    assert plan.seen_tokens(16) == 5 * 16


def test_groups_that_reach_no_layer_are_named() -> None:
    plan = build(replace(L, groups=2))
    assert plan.idle_groups == (2, 3)
    assert "dealt but injected nowhere: groups 2, 3" in plan.draw()
    assert build(replace(L, groups=0, sequence=Sequence.global_and_tiles)).idle_groups == ()


def test_drawing_shows_every_injection_at_its_layer_and_an_empty_plan_says_so() -> None:
    lines = build(L).draw().splitlines()
    assert next(line for line in lines if "layer  3" in line).endswith("<- group 2")
    assert sum("<-" in line for line in lines) == 4
    assert "no injections: nothing is stacked" in build(replace(L, tiles=0, groups=0)).draw()


def test_context_and_seen_tokens_are_the_papers() -> None:
    assert (build(L).context_tokens(576), build(L).seen_tokens(576)) == (576, 2880)
    string = build(replace(L, groups=0, sequence=Sequence.global_and_tiles))
    assert (string.context_tokens(576), string.seen_tokens(576)) == (2880, 2880)
    baseline = build(replace(L, groups=0, tiles=0))
    assert (baseline.context_tokens(576), baseline.seen_tokens(576)) == (576, 576)


def test_gated_injections_are_counted_per_host() -> None:
    plan = build(replace(L, operator=Operator.gated_add, injections=[InjectionConfig(host=Host.vit, group=1, layer=2)]))
    assert len(plan.gated(Host.llm)) == 4
    assert plan.gated(Host.vit) == ()
    assert plan.at(Host.vit)[2] == (Injection(Host.vit, 2, 1),)


TAPS = ModelConfig(name="taps", tiles=0, source=Source.tap, taps=[1, -1], groups=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"taps": [-7, 1]},
            r"model\.taps=\[-7, 1\]: -7 is no hidden state .* read after 4 blocks.*-1 \(the feature\) to -5",
        ),
        ({"taps": [5, 1]}, r"model\.taps=\[5, 1\]: 5 is no hidden state"),
        (
            {"taps": [1, 2], "sequence": Sequence.blank},
            r"deepest tap is 2: blocks would run for nothing.*feature_layer=2",
        ),
        ({"groups": 3}, r"model\.taps=\[1, -1\] reads 2 hidden states"),
        (
            {
                "taps": [1],
                "tiles": 4,
                "groups": 1,
                "sequence": Sequence.blank,
                "injections": [InjectionConfig(layer=2), InjectionConfig(layer=3, host=Host.vit, group=1)],
            },
            r"vit layer 3: with model\.sequence=blank nothing of the global view",
        ),
    ],
)
def test_taps_that_cannot_be_or_that_read_for_nothing_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.build(replace(TAPS, **change), llm_layers=12, vit_layers=4)


def test_a_stack_in_the_tower_may_leave_it_by_a_tap_alone() -> None:
    stacked = replace(
        TAPS, tiles=4, sequence=Sequence.blank, injections=[InjectionConfig(layer=3, host=Host.vit, group=1)]
    )
    assert Plan.build(stacked, llm_layers=12, vit_layers=4).taps == (1, 4)
