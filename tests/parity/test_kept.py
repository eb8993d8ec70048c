"""What is odd in the published code and kept for equal numbers: E10 to E14 and E18 of method E, against the oracle."""

import copy
from dataclasses import replace

import pytest
import torch
from ablations import ARMS, HD, PLAIN, Arm, L, assert_like_the_oracle, batch_for, model_of, samples_of
from oracle import cut_slowly, forward_slowly, grid_slowly, tower_slowly, views_slowly
from tiny import MIXED, picture
from torch import Tensor

from deepstack_pl.batch import PadSide
from deepstack_pl.stacking.config import Newline, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.views import normalise

TEXT, ONE, TWO, WIDE = MIXED


@pytest.mark.parametrize("newline", [Newline.rows_and_groups, Newline.rows])
def test_e10_the_newline_is_added_again_with_every_group_where_the_plan_says_so(newline: Newline) -> None:
    """Published, and kept by ``rows_and_groups``: each group holds the newline too. ``rows`` leaves it out."""
    model = model_of(Arm(replace(HD, newline=newline)))
    batch = batch_for(model, [ONE])
    with torch.no_grad():
        record = model(**batch.model_inputs(), record=True).record
    places = batch.token_index[0] == torch.arange(batch.token_index.max() + 1)[batch.sequence_rows == -2][:, None]
    at_newline = places.any(0)
    # 16 tokens of the global view, then rows of 2 tiles of 4 patches and a newline each, after [1, ...].
    assert at_newline.nonzero().flatten().tolist() == [1 + 16 + 9 * row + 8 for row in range(8)]
    assert len(record) == 4
    for trace in record:
        expected = model.image_newline if newline is Newline.rows_and_groups else torch.zeros(32)
        assert torch.equal(trace.added[0, at_newline], expected.expand(8, -1))
    assert_like_the_oracle(model, [ONE, TEXT, TWO], PadSide.left)


@pytest.mark.parametrize("side", [5, 16])
def test_e11_a_small_square_image_becomes_one_tile_over_another_stretched(side: int) -> None:
    """Published, and kept: ties between grids go to the first, (1, 2), and no aspect is preserved."""
    image = picture(0, side, side)
    model = model_of(PLAIN["l"])
    (sample,) = samples_of(model, [(ONE[0], [image])])
    assert len(sample.views) == 3
    seen = views_slowly(model, image)
    assert seen.grid == (1, 2)
    assert torch.equal(normalise(sample.views, model.config.typed_vision()), torch.stack([seen.whole, *seen.tiles]))
    tall = image.resize((16, 32), 3)  # bicubic
    for tile, box in zip(cut_slowly(image, (1, 2), 16), ((0, 0, 16, 16), (0, 16, 16, 32)), strict=True):
        assert tile.tobytes() == tall.crop(box).tobytes()


def test_e11_e12_grids_are_those_of_the_published_rule_and_never_one_tile() -> None:
    """Published, and kept: the grid (1, 1) is no candidate."""
    plan = Plan.build(L, llm_layers=6, vit_layers=3)
    model = model_of(PLAIN["l"])
    for width in range(4, 84, 13):
        for height in range(4, 84, 11):
            (sample,) = samples_of(model, [(ONE[0], [picture(0, width, height)])])
            columns, rows = grid_slowly(width, height, 16, plan)
            assert len(sample.views) == 1 + columns * rows >= 3


def test_e13_groups_that_a_small_grid_leaves_empty_add_nothing_and_are_zero_tokens_in_strings() -> None:
    """Published, and kept: an image of two tiles has two groups of zeros, in strings too."""
    tall = (ONE[0], [picture(4, 20, 60)])
    model = model_of(PLAIN["l"])
    assert views_slowly(model, tall[1][0]).grid == (1, 3)
    batch = batch_for(model, [tall])
    with torch.no_grad():
        record = model(**batch.model_inputs(), record=True).record
    assert [bool(trace.touched.any()) for trace in record] == [True, True, True, False]
    string = model_of(ARMS["string_withglobal"])
    batch = batch_for(string, [tall])
    assert (batch.token_index >= 0).sum() == 5 * 16
    assert (batch.sequence_rows[-16:] == -1).all()
    assert_like_the_oracle(string, [tall, TEXT], PadSide.right)
    left_out = model_of(Arm(replace(ARMS["string_withglobal"].plan, unfilled=L.unfilled)))
    assert (batch_for(left_out, [tall]).token_index >= 0).sum() == 4 * 16


@pytest.mark.parametrize("start", [0, 1])
def test_e14_a_hidden_state_is_the_layer_before_its_output_and_not_yet_stacked(start: int) -> None:
    """Published: the group is added in place, so that ``hidden_states[l]`` holds it already. Here the record says what
    was added, and ``hidden_states[l]`` plus that is the layer's input. Only ``hidden_states[0]``, which nothing put
    out, is the first layer's input itself, stacked where the plan begins at 0.
    """
    model = model_of(Arm(replace(L, start_layer=start)))
    batch = batch_for(model, [ONE])
    inputs: list[Tensor] = []
    with torch.no_grad():
        output = model(**batch.model_inputs(), output_hidden_states=True, record=True)
        forward_slowly(model, *ONE, layer_inputs=inputs)
    added = {trace.injection.layer: trace.added[0] for trace in output.record}
    assert len(output.hidden_states) == 7
    for layer, expected in enumerate(inputs):
        found = output.hidden_states[layer][0]
        if layer in added and layer:
            assert (found - expected).abs().max() > 1e-3
            found = found + added[layer]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_e18_a_group_at_the_selected_feature_passes_no_further_block() -> None:
    """Published, and kept for parity: with its best start the fourth group is added to the feature itself."""
    model = model_of(PLAIN["v"])
    assert model.plan.injections[-1].layer == model.plan.vit_layers == 3
    batch = batch_for(model, [ONE])
    without = batch.vit_rows.clone()
    without[3] = -1
    with torch.no_grad():
        tower = model.vision_tower
        difference = tower(batch.views, batch.vit_rows)[0] - tower(batch.views, without)[0]
        embedded = tower.tower.embed(normalise(batch.views, tower.tower.config))[:, 1:].flatten(
            0, 1
        )  # groups are dealt before block 0
        torch.testing.assert_close(difference[0], embedded[batch.vit_rows[3]], atol=1e-5, rtol=1e-5)
        seen = tower_slowly(model, views_slowly(model, ONE[1][0]))
        torch.testing.assert_close(tower(batch.views, batch.vit_rows)[0][0], seen.whole, atol=1e-5, rtol=1e-5)


def test_dummy_groups_and_only_global_features_are_the_global_view_and_nothing_of_the_tiles() -> None:
    """Controls must not see the enlarged image: another one behind an equal global view is no news."""
    for name in ("dummy_local", "only_global_features"):
        model = model_of(ARMS[name])
        assert {i.source for i in model.plan.injections} == {Source.global_view}
        batch = batch_for(model, [ONE])
        other = copy.copy(batch)
        other.views = batch.views.clone()
        other.views[1:] = 0
        with torch.no_grad():
            assert torch.equal(model(**batch.model_inputs()).logits, model(**other.model_inputs()).logits)
