"""Receipts over views as levels: either backend passes, and a tower that takes levels for pixels does not."""

import pytest
import torch
from small_run import STACKED, small_model, small_processor
from spoiling import failure

from deepstack_pl.inspection.probe import own_gates, probe_batch, run
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import GridRule, ModelConfig, Resize
from deepstack_pl.vision import encoder
from deepstack_pl.vision.config import ViewsBackend
from deepstack_pl.vision.views import normalise

PLANS = [
    STACKED,
    ModelConfig(name="boxed", start_layer=1, tiles=6, groups=4, grid=GridRule.best_fit, resize=Resize.letterbox),
    ModelConfig(name="detail", start_layer=1, detail=2),
]


def on_torch(plan: ModelConfig) -> DeepStackProcessor:
    processor = small_processor(plan)
    processor.backend = ViewsBackend.torch
    return processor


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_receipt_holds_on_either_backend(plan: ModelConfig) -> None:
    assert take_receipt(small_model(plan), small_processor(plan)).ok
    assert take_receipt(small_model(plan), on_torch(plan)).ok


def test_backends_differ_enough_for_the_receipt_to_tell_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above compares torch's views with torch's, and not anything with anything."""
    processor = on_torch(STACKED)
    monkeypatch.setattr(processor, "prepare", small_processor(STACKED).prepare)
    assert "is not the one dealt from its image's tiles" in failure(small_model(STACKED), processor)


def test_a_tower_that_takes_levels_for_pixels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "normalise", lambda views, vision: views.float())
    assert "is not the one dealt from its image's tiles" in failure(small_model(STACKED))


def test_a_probe_s_views_enter_as_in_training_and_as_a_leaf_where_gradients_are_asked_for() -> None:
    model, processor = small_model(), small_processor()
    batch = probe_batch(model, processor)
    plain = run(model, batch, own_gates(model))
    graph = run(model, batch, own_gates(model), gradients=True)
    assert plain.views.dtype is batch.views.dtype is torch.uint8
    assert torch.equal(graph.views, normalise(batch.views, processor.vision))
    assert graph.views.is_leaf
    assert graph.views.requires_grad
    torch.testing.assert_close(plain.logits, graph.logits)
