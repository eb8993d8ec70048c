"""The callback: it stops what it must, shows what there is, and changes nothing."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_run import STACKED, Pages, small_model, small_module, small_processor, small_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepstack_pl.data.config import DataConfig
from deepstack_pl.evaluation.callback import GenerationCallback
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.inspection.callback import InspectionCallback, global_view
from deepstack_pl.inspection.receipt import ReceiptError, take_receipt
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.training.datamodule import DeepStackDataModule


def watchers(config: ModelConfig = STACKED):
    processor = small_processor(config)
    values = EvaluationConfig(name="small", every_steps=2, samples=4, batch_size=4, max_new_tokens=9)
    validation = GenerationCallback(Pages(), processor, values, pages_per_kind=1)
    return [validation, InspectionCallback(processor, validation, config="model:\n  start_layer: 1")]


def fit(folder, *callbacks, logger=False, module=None):
    data = DeepStackDataModule(Pages(), Pages(), small_processor(), DataConfig(name="x", batch_size=4, workers=0), 0, 4)
    module = module or small_module()
    small_trainer(folder, callbacks=list(callbacks), logger=logger).fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """What TensorBoard reads after a short run."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    fit(folder, *watchers(), logger=TensorBoardLogger(folder, name="", version=""))
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


def text(board, tag):
    return board.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_shows_plan_receipt_and_parts_from_the_start(board):
    assert [event.step for event in board.Images("plan/drawing")] == [0]
    assert "llm layer  1 | <- group 0" in text(board, "plan/text")
    assert "Receipt of plan deepstack_l" in text(board, "plan/receipt")
    assert "| group 3 -> llm layer 4 | 48 | 48 |" in text(board, "plan/receipt")
    assert "peak lr" in text(board, "plan/parts")
    assert text(board, "plan/config") == "    model:\n      start_layer: 1"


def test_tensorboard_shows_answered_pages_of_each_kind_at_each_validation(board):
    for tag in ("pages/long 0", "pages/short 1"):
        assert [event.step for event in board.Images(tag)] == [2, 4]
        assert "&lt;image>Which colours?" in text(board, tag)
        assert "prediction: " in text(board, tag)


def test_tensorboard_shows_how_strong_each_injection_is(board):
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("injection added over stream/")]
    assert sorted(tags) == [f"injection added over stream/llm layer 0{k + 1} group {k}" for k in range(4)]
    for tag in tags:
        assert [event.step for event in board.Scalars(tag)] == [2, 4]
        assert all(event.value > 0 for event in board.Scalars(tag))


def test_without_tensorboard_it_is_silent_and_still_takes_the_receipt(tmp_path):
    callbacks = watchers()
    fit(tmp_path, *callbacks, logger=CSVLogger(tmp_path))
    assert callbacks[1].receipt.ok
    assert not list(tmp_path.rglob("events.*"))


def test_a_run_whose_receipt_fails_stops_before_its_first_step(tmp_path):
    module = small_module()
    module.configure_model()
    layer = decoder_layers(module.network.language_model)[3]
    for hook in layer._forward_pre_hooks.values():
        hook.places = []
    with pytest.raises(ReceiptError, match="group 2 -> llm layer 3: it left no record"):
        fit(tmp_path, *watchers(), module=module)
    assert module.trainer.global_step == 0


def test_a_receipt_that_was_taken_before_is_not_taken_again(tmp_path, monkeypatch):
    callbacks = watchers()
    callbacks[1].receipt = take_receipt(small_model(), small_processor())
    monkeypatch.setattr("deepstack_pl.inspection.callback.take_receipt", None)
    fit(tmp_path, *callbacks)


def test_taking_the_callbacks_away_changes_no_weight(tmp_path):
    watched = fit(tmp_path / "a", *watchers(), logger=TensorBoardLogger(tmp_path / "a"))
    alone = fit(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_tensorboard_shows_what_leaving_each_injection_out_costs_and_what_answers_attend_to(board):
    tags = board.Tags()["scalars"]
    for name in ("injection cosine", "injection gradient", "loss without"):
        assert f"{name}/llm layer 02 group 1" in tags
    assert "loss without/all of them" in tags
    assert {f"attention on visual tokens/layer {layer:02}" for layer in range(6)} <= set(tags)
    pictures = ["injections/left out", "injections/in the stream", "attention/visual share", "attention/map"]
    for tag in [*pictures, "pages/as it is dealt"]:
        assert [event.step for event in board.Images(tag)] == [2, 4]


def test_the_global_view_is_the_page_as_the_model_sees_it():
    view = global_view(small_processor(), Pages()[5])
    page = Pages()[5].images[0]
    assert view.shape == (16, 16, 3)
    assert view[8, 2] * 255 == pytest.approx(page.getpixel((4, 16)), abs=2)
    assert view[8, 13] * 255 == pytest.approx(page.getpixel((27, 16)), abs=2)
