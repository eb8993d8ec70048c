"""Validation during training."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from small_run import Pages, small_module, small_processor, small_trainer

from deepstack_pl.data.config import DataConfig
from deepstack_pl.evaluation.callback import GenerationCallback
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.training.datamodule import DeepStackDataModule


def validation(every, pages=2):
    config = EvaluationConfig(name="small", every_steps=every, samples=6, batch_size=6, max_new_tokens=3)
    return GenerationCallback(Pages(), small_processor(), config, pages_per_kind=pages)


def fit(folder, *callbacks, **more):
    data = DeepStackDataModule(Pages(), Pages(), small_processor(), DataConfig(name="x", batch_size=4, workers=0), 0, 4)
    trainer, module = small_trainer(folder, callbacks=list(callbacks), **more), small_module()
    trainer.fit(module, datamodule=data)
    return trainer, module


def test_accuracy_by_kind_is_logged_at_its_steps(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = validation(2)
    trainer, _ = fit(tmp_path, callback, logger=logger)
    names = {f"val/{kind}/{name}" for kind in ("long", "short") for name in ("accuracy", "exact_match")}
    with open(logger.experiment.metrics_file_path) as file:
        lines = [line for line in csv.DictReader(file) if any(line.get(name) for name in names)]
    assert [line["step"] for line in lines] == ["2", "4"]
    assert all(line[name] for line in lines for name in names)
    assert callback.last_step == 4
    assert {"long", "short"} <= set(trainer.progress_bar_metrics)


def test_a_few_pages_of_every_kind_are_kept_with_their_images(tmp_path):
    callback = validation(4, pages=1)
    fit(tmp_path, callback)
    assert [answer.kind for _, answer in callback.pages] == ["long", "short"]
    assert all(record.key == answer.key and record.images for record, answer in callback.pages)
    assert callback.last_results is not None
    assert len(callback.last_results.records) == 6


def test_an_accumulated_step_is_validated_once(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("deepstack_pl.evaluation.callback.log_results", lambda *args: seen.append(args[-1]))
    fit(tmp_path, validation(1), accumulate_grad_batches=2)
    assert seen == [1, 2, 3, 4]


def test_never_is_never(tmp_path):
    callback = validation(0)
    fit(tmp_path, callback)
    assert callback.last_step == -1


def test_validation_changes_no_weight(tmp_path):
    (_, watched), (_, alone) = fit(tmp_path, validation(1)), fit(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.every_steps=-1"):
        validation(-1)
