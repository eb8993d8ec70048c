"""Receipts of plans that inject more than groups of tiles: details with newlines, the global view once more."""

import pytest
import torch
from small_run import VISION, small_model, small_processor
from spoiling import broken, failure

from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.stacking.config import (
    Encoding,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Operator,
    Order,
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
