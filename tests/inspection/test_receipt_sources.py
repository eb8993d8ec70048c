"""Receipts of plans that inject more than groups of tiles: details with newlines, the global view once more."""

from dataclasses import replace

import pytest
import torch
from small_run import LLM, TOKENIZER, VISION, small_model, small_processor
from spoiling import broken, failure

from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.multimodal import groups, projector
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig, ProjectorKind, Sharing
from deepstack_pl.multimodal.projector import TwoProjectors, join
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
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.injection import NEWLINE, NOTHING

HD = ModelConfig(
    name="hd",
    detail=2,
    sequence=Sequence.global_and_tiles,
    order=Order.raster,
    newline=Newline.rows_and_groups,
    source=Source.detail,
)
DUMMY = ModelConfig(name="dummy", tiles=0, source=Source.global_view)
FUSION = ModelConfig(name="fusion", start_layer=0, interval=0, collisions=Collisions.sum)
TAPS = ModelConfig(name="taps", tiles=0, source=Source.tap, taps=[1, 2, -1], groups=3)
GRANITE = ModelConfig(
    name="granite",
    tiles=0,
    pooling=2,
    sequence=Sequence.blank,
    source=Source.tap,
    taps=[-1, 1],
    groups=2,
    start_layer=0,
    injections=[InjectionConfig(source=Source.spatial, group=k, layer=2 + k) for k in range(4)],
)
PLANS = [
    HD,
    ModelConfig(name="hd_6", tiles=6, detail=2, sequence=Sequence.global_and_tiles, source=Source.detail),
    ModelConfig(
        name="hd_rows",
        detail=2,
        sequence=Sequence.global_and_tiles,
        order=Order.raster,
        newline=Newline.rows,
        source=Source.detail,
        operator=Operator.gated_add,
    ),
    ModelConfig(name="detail_of_the_global_view", tiles=0, detail=2, source=Source.detail),
    DUMMY,
    ModelConfig(name="only_global", tiles=0, sequence=Sequence.blank, source=Source.global_view, groups=1),
    ModelConfig(
        name="global_and_groups",
        sequence=Sequence.blank,
        start_layer=2,
        injections=[InjectionConfig(layer=1, source=Source.global_view)],
    ),
    ModelConfig(name="string", sequence=Sequence.global_and_tiles, unfilled=Unfilled.zeros),
    ModelConfig(name="pooled", pooling=2),
    ModelConfig(name="pooled_v", pooling=2, host=Host.vit, start_layer=0),
    ModelConfig(name="one_pass", grid=GridRule.square, encoding=Encoding.one_pass),
    FUSION,
    TAPS,
    GRANITE,
    ModelConfig(
        name="taps_of_a_string",
        sequence=Sequence.global_and_tiles,
        order=Order.raster,
        newline=Newline.rows,
        source=Source.tap,
        taps=[0, 2],
        groups=2,
    ),
    ModelConfig(
        name="taps_of_a_stacked_tower",
        source=Source.tap,
        taps=[1, -1],
        groups=2,
        injections=[InjectionConfig(layer=2, host=Host.vit, group=k) for k in range(1)],
    ),
    ModelConfig(name="dummy_v", tiles=0, source=Source.global_view, host=Host.vit, start_layer=0, groups=2),
]
SLOTS = 16 + 2 * 4 * (2 * 4 + 1)  # of an image under HD: the global view, and eight rows of eight and a newline


@pytest.mark.parametrize("config", PLANS, ids=lambda config: config.name)
def test_receipts_of_sound_plans_are_ok(config):
    receipt = take_receipt(small_model(config), small_processor(config))
    assert receipt.ok, receipt.markdown()
    assert len(receipt.rows) == len(config.injections) + config.groups


def test_details_touch_every_position_of_their_images_newlines_included():
    receipt = take_receipt(small_model(HD), small_processor(HD))
    assert [row.touched for row in receipt.rows] == [3 * SLOTS] * 4


def groups_swapped(batch):
    batch.group_rows[:2] = batch.group_rows[:2].flip(0)


def newlines_left_out(batch):
    batch.group_rows[batch.group_rows == NEWLINE] = NOTHING


def newline_a_column_early(batch):
    rows = batch.group_rows
    at = (rows[0] == NEWLINE).nonzero().squeeze(1)
    rows[:, at], rows[:, at - 1] = rows[:, at - 1].clone(), NEWLINE


def details_of_the_view_before(batch):
    per_view, others = 16, batch.group_rows >= 0
    batch.group_rows[others] -= 4 * per_view


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (groups_swapped, "detail group 1 -> llm layer 2: detail group 1 is not the one dealt from its image's details"),
        (newlines_left_out, "detail group 0 -> llm layer 1: it misses 24 of its images' 264 positions"),
        (newline_a_column_early, "at 48 of 264 positions"),
        (details_of_the_view_before, "is not the one dealt from its image's details"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_details_in_wrong_places_are_named(spoil, said):
    message = failure(small_model(HD), broken(spoil, HD), HD)
    assert said in message, message


def test_another_image_s_global_view_is_named():
    def others(batch):
        batch.group_rows[:] = batch.group_rows.roll(16, dims=1)

    message = failure(small_model(DUMMY), broken(others, DUMMY), DUMMY)
    assert "positions changes with that image's global view: wrong image" in message


def test_a_newline_that_was_never_learned_of_is_named():
    """A newline of zeros, as a checkpoint without one would give, touches nothing where it should."""
    model = small_model(HD)
    with torch.no_grad():
        model.image_newline.zero_()
    assert "it misses 24 of its images' 264 positions" in failure(model, config=HD)


def test_the_probe_s_patches_differ_at_the_finest_views():
    from deepstack_pl.inspection.probe import probe_images

    processor = small_processor(HD)
    image = probe_images(processor.plan, VISION)[0]
    assert image.size == (64, 64)  # 2 x 2 tiles of 16 pixels, twice over


def text_fault(config, model=None, spoil=lambda batch: None):
    return failure(model or small_model(config), broken(spoil, config), config)


def reversed_text(batch):
    batch.sequence_rows[:] = batch.sequence_rows.flip(0)


def global_view_in_the_blank(batch):
    batch.sequence_rows[:] = torch.arange(len(batch.sequence_rows))


def newlines_of_the_text_left_out(batch):
    batch.sequence_rows[batch.sequence_rows == NEWLINE] = NOTHING


BASELINE = ModelConfig(name="baseline", tiles=0, groups=0)
ONLY_GLOBAL, STRING = (next(plan for plan in PLANS if plan.name == name) for name in ("only_global", "string"))


@pytest.mark.parametrize(
    ("config", "spoil", "count"),
    [
        (BASELINE, reversed_text, 48),
        (HD, reversed_text, 264),
        (HD, newlines_of_the_text_left_out, 24),
        (ONLY_GLOBAL, global_view_in_the_blank, 48),
        (STRING, reversed_text, 240),
    ],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else None,
)
def test_images_that_stand_wrongly_in_the_text_are_named_whether_anything_is_stacked_or_not(config, spoil, count):
    message = text_fault(config, spoil=spoil)
    assert f"the text does not hold what the plan lays there at {count} of" in message, message


def test_tokens_that_are_not_averaged_are_named(monkeypatch):
    model = small_model(ModelConfig(name="pooled", pooling=2))
    monkeypatch.setattr(groups, "pool", lambda tokens, square: tokens[:, :4])
    message = text_fault(ModelConfig(name="pooled", pooling=2), model)
    assert "group 0 is not the one dealt from its image's tiles" in message
    assert "the text does not hold what the plan lays there" in message


@pytest.mark.parametrize("how", ["scrambled", "tile by tile"])
def test_a_pass_that_is_not_one_is_named(how, monkeypatch):
    config = ModelConfig(name="one_pass", grid=GridRule.square, encoding=Encoding.one_pass)
    model = small_model(config)
    encoder = model.vision_tower
    if how == "scrambled":
        honest = encoder._one_pass
        monkeypatch.setattr(encoder, "_one_pass", lambda views, images: honest(views, images).roll(1, dims=0))
    else:
        separate = small_model(ModelConfig(name="l", grid=GridRule.square)).vision_tower
        monkeypatch.setattr(
            encoder,
            "_one_pass",
            lambda views, images: separate(views, torch.empty(0, 16 * images, dtype=torch.long))[0],
        )
    assert "is not the one dealt from its image's tiles" in text_fault(config, model)


def test_projectors_that_changed_places_are_named():
    model = small_model(ModelConfig(name="two"))
    two = TwoProjectors(ProjectorKind.mlp2x_gelu, VISION.width, 32, 1)
    honest = two.forward
    model.projector, model.config.projector_sharing = two, "global_and_tiles"
    assert take_receipt(model, small_processor(ModelConfig(name="two"))).ok
    two.global_view, two.tiles = two.tiles, two.global_view
    two.forward = lambda tokens, images: honest(tokens.flip(0), len(tokens) - images).flip(0)
    assert "the text does not hold what the plan lays there" in text_fault(ModelConfig(name="two"), model)


@pytest.mark.parametrize("resize", list(Resize))
def test_an_oblong_image_dealt_or_resized_wrongly_is_named(resize, monkeypatch):
    from deepstack_pl.vision import views

    config = ModelConfig(name="l", resize=resize)
    assert take_receipt(small_model(config), small_processor(config)).ok
    enlarger = views._enlarger
    other = {Resize.stretch: Resize.letterbox, Resize.letterbox: Resize.stretch}
    monkeypatch.setattr(views, "_enlarger", lambda stretch, r, own: enlarger(stretch, other[r], own))
    message = failure(small_model(config), config=config)
    assert "is not the one dealt from its image's tiles at" in message
    assert "(of an image of 1 x 3 tiles)" in message


def joining(config, kind, sharing=Sharing.per_injection):
    """A small model whose groups have projectors of ``kind``."""
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    return build_model(
        config, LLM, VISION, ProjectorConfig(name="own", kind=kind, sharing=sharing), seed=0, image_token_id=image
    )


@pytest.mark.parametrize("kind", [ProjectorKind.pixel_shuffle, ProjectorKind.patch_merger, ProjectorKind.linear])
def test_receipts_of_projectors_that_join_squares_and_of_one_for_each_injection_are_ok(kind):
    for config in (GRANITE, replace(TAPS, pooling=2), ModelConfig(name="pooled", pooling=2)):
        receipt = take_receipt(joining(config, kind), small_processor(config))
        assert receipt.ok, receipt.markdown()


def test_a_tap_of_another_depth_is_named(monkeypatch):
    model = small_model(TAPS)
    honest = model.vision_tower.forward
    monkeypatch.setattr(model.vision_tower, "forward", lambda *args: [honest(*args)[i] for i in (0, 1, 1, 3)])
    message = text_fault(TAPS, model)
    assert "tap 1 -> llm layer 2: tap 1 is not the one dealt from its image's views at 48 of 48 positions" in message
    assert "tap 0 -> " not in message


def test_a_spatial_group_of_another_place_is_named(monkeypatch):
    pick = groups.pick
    monkeypatch.setattr(groups, "pick", lambda tokens, square, place: pick(tokens, square, [0, 2, 1, 3][place]))
    message = text_fault(GRANITE, small_model(GRANITE))
    for place, wrong in enumerate([False, True, True, False]):
        named = f"spatial group {place} is not the one dealt from its image's views at 12 of 12 positions" in message
        assert named == wrong


def test_squares_joined_in_another_order_are_named(monkeypatch):
    config = ModelConfig(name="pooled", pooling=2)
    model = joining(config, ProjectorKind.pixel_shuffle, Sharing.shared)
    monkeypatch.setattr(projector, "join", lambda tokens, square: join(tokens.flip(-1), square).flip(-1))
    assert "the text does not hold what the plan lays there at 12 of 12" in text_fault(config, model)


def test_features_that_are_fused_at_the_input_twice_are_named():
    model = small_model(FUSION)
    hook = decoder_layers(model.language_model)[0]._forward_pre_hooks
    (first,) = hook.values()
    first.places = [*first.places[:3], first.places[2]]
    message = failure(model, config=FUSION)
    assert "group 3 -> llm layer 0: it left no record" in message
    assert "group 2 -> llm layer 0: it happened, but the plan does not say so" in message
