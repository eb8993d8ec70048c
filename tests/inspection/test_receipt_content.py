"""Receipts look at what lands where: the right image's tokens, in another group's place or order, are caught."""

import pytest
import torch
from PIL import Image
from small_run import STACKED, VISION, small_model, small_processor
from spoiling import broken, failure

from deepstack_pl.inspection import content
from deepstack_pl.inspection.content import lay_out
from deepstack_pl.inspection.probe import Pictures, probe_batch
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import ReceiptError
from deepstack_pl.stacking.config import Dealing, Host, InjectionConfig, ModelConfig, Operator, Source
from deepstack_pl.vision.config import ViewsBackend

PLANS = {
    Host.llm: STACKED,
    Host.vit: ModelConfig(name="v", host=Host.vit, start_layer=0),
}
PATCHES = 16  # of a view; the probe's three images stand one after another in the tables


def all_are_group_0(rows):
    rows[:] = rows[0].clone()


def groups_0_and_1_swapped(rows):
    rows[:2] = rows[:2].flip(0)


def each_image_reversed(rows):
    rows[:] = rows.unflatten(1, (-1, PATCHES)).flip(-1).flatten(1)


def one_patch_everywhere(rows):
    rows[:] = rows[:, ::PATCHES].repeat_interleave(PATCHES, dim=1)


SPOILERS = {
    all_are_group_0: {1: 48, 2: 48, 3: 48},
    groups_0_and_1_swapped: {0: 48, 1: 48},
    each_image_reversed: {0: 48, 1: 48, 2: 48, 3: 48},
    one_patch_everywhere: {0: 45, 1: 45, 2: 45, 3: 45},
}


def rows_of(batch, host):
    return batch.group_rows if host is Host.llm else batch.vit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", list(Host))
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_tokens_of_the_right_image_in_wrong_places_are_named(spoil, host, dtype):
    config = PLANS[host]
    spoilt = broken(lambda batch: spoil(rows_of(batch, host)), config)
    message = failure(small_model(config).to(dtype), spoilt)
    for group in range(4):
        wrong = SPOILERS[spoil].get(group)
        said = f"group {group} is not the one dealt from its image's tiles at {wrong} of 48 positions"
        assert (said in message) == (wrong is not None), message


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_a_gate_hides_no_swap(gate):
    config = ModelConfig(name="gated", operator=Operator.gated_add)
    model = small_model(config)
    with torch.no_grad():
        model.gates["llm"].fill_(gate)
    message = failure(model, broken(lambda batch: groups_0_and_1_swapped(batch.group_rows), config))
    assert message.count("is not the one dealt from its image's tiles at 48 of 48 positions") == 2


def test_one_position_with_another_patch_is_counted():
    def swap(batch):
        if batch.group_rows.shape[1] == 3 * PATCHES:  # the full pictures; there is an oblong one, too
            batch.group_rows[2, [20, 21]] = batch.group_rows[2, [21, 20]]

    message = failure(small_model(), broken(swap))
    assert "group 2 is not the one dealt from its image's tiles at 2 of 48 positions" in message
    assert "group 1" not in message


def test_tiles_in_another_order_are_named():
    def turn(batch):
        if len(batch.views) == 3 * 5:  # the full pictures; there is an oblong one, too
            batch.views[3:] = batch.views[3:].unflatten(0, (3, 4)).flip(1).flatten(0, 1)

    assert failure(small_model(), broken(turn)).count("is not the one dealt from its image's tiles") == 4


TWO_LATE = [InjectionConfig(group=2, layer=1), InjectionConfig(group=3, layer=2)]
MODEL_AND_PROCESSOR = {
    "other_groups": (
        ModelConfig(name="late", groups=0, injections=TWO_LATE),
        ModelConfig(name="early", groups=2, start_layer=1),
    ),
    "other_dealing": (STACKED, ModelConfig(name="tiles", start_layer=1, dealing=Dealing.tiles)),
}


@pytest.mark.parametrize(("ours", "theirs"), MODEL_AND_PROCESSOR.values(), ids=MODEL_AND_PROCESSOR)
def test_a_processor_of_another_plan_is_refused(ours, theirs):
    model, processor = small_model(ours), small_processor(theirs)
    with pytest.raises(ReceiptError) as caught:
        take_receipt(model, processor)
    assert f"{processor.plan.name} ({processor.plan.digest})" in str(caught.value)
    assert f"{model.plan.name} ({model.plan.digest})" in str(caught.value)


def test_a_processor_of_another_plan_is_refused_where_nothing_is_injected():
    with pytest.raises(ReceiptError, match="deals under plan deepstack_l"):
        take_receipt(small_model(ModelConfig(name="baseline", tiles=0, groups=0)), small_processor())


@pytest.mark.parametrize(("ours", "theirs"), MODEL_AND_PROCESSOR.values(), ids=MODEL_AND_PROCESSOR)
def test_a_processor_that_deals_otherwise_than_its_plan_says_is_named(ours, theirs):
    processor = small_processor(ours)
    processor.prepare = small_processor(theirs).prepare
    message = failure(small_model(ours), processor)
    for injection in processor.plan.injections:
        assert f"group {injection.group} is not the one dealt from its image's tiles at" in message


def test_the_slow_way_names_tokens_by_where_they_lie_in_the_picture(monkeypatch):
    """With a tower that reads a patch's mean colour, group (i, j) at (y, x) is the patch at (2 y + i, 2 x + j)."""
    model, processor = small_model(), small_processor()
    pages = [Image.new("RGB", (32, 32)) for _ in range(3)]
    for number, page in enumerate(pages):
        for y in range(8):
            for x in range(8):
                page.paste((y * 10, x * 10, number * 10), (x * 4, y * 4, x * 4 + 4, y * 4 + 4))
    mean, std = torch.tensor(VISION.mean), torch.tensor(VISION.std)

    def colours(model, views, vit_rows, pictures):
        patches = torch.nn.functional.avg_pool2d(views, 4).flatten(2).transpose(1, 2)
        return (patches * std + mean) * 25.5

    monkeypatch.setattr(content, "features", colours)
    monkeypatch.setattr(content, "projected", lambda model, seen, images, dealt: seen)
    dealt = lay_out(model, probe_batch(model, processor), Pictures(pages, (2, 2)), ViewsBackend.pil).groups
    assert list(dealt) == [(Host.llm, Source.tiles, group) for group in range(4)]
    for (_, _, group), images in dealt.items():
        i, j = divmod(group, 2)
        for number, tokens in enumerate(images):
            places = [(2 * y + i, 2 * x + j, number) for y in range(4) for x in range(4)]
            assert torch.allclose(tokens, torch.tensor(places).float(), atol=1e-4)
