"""Validation during training."""

import csv
from dataclasses import replace

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from small_run import TOKENIZER, Pages, small_module, small_processor, small_trainer

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data.config import DataConfig
from deepstack_pl.evaluation.callback import GenerationCallback
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.evaluation.runner import require_room
from deepstack_pl.training.datamodule import DeepStackDataModule


def validation(every, pages=2, **more):
    values = {"samples": 6, "batch_size": 6, "max_new_tokens": 9, **more}
    config = EvaluationConfig(name="small", every_steps=every, **values)
    return GenerationCallback(Pages(), small_processor(), config, pages_per_kind=pages)


def fit(folder, *callbacks, micro=None, **more):
    config = DataConfig(name="x", batch_size=4, micro_batch_size=micro, workers=0)
    data = DeepStackDataModule(Pages(), Pages(), small_processor(), config, 0, 4)
    more = {"accumulate_grad_batches": config.accumulation(), **more}
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
    fit(tmp_path, validation(1), micro=2)
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


def test_a_kind_of_which_no_answer_fits_is_refused_before_the_first_step(tmp_path):
    steps = []

    class Steps(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(batch_idx)

    message = r"kind '\w+' can be asked; sample 'page \d+': .* tokens, but evaluation\.max_new_tokens=2.*Set evaluation"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, validation(0, max_new_tokens=2), Steps())
    assert steps == []


def test_only_the_samples_that_are_evaluated_must_fit():
    class Last(Pages):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            text = "red " * 9 if index == 11 else "red"
            return replace(record, turns=(*record.turns[:-1], Turn(Role.assistant, text)))

    config = EvaluationConfig(name="small", samples=6, final_samples=11, max_new_tokens=2)
    assert require_room(small_processor(), Last(), config) == []
    (why,) = require_room(small_processor(), Last(), replace(config, final_samples=12))
    assert "sample 'page 11'" in why


def test_samples_that_cannot_be_asked_are_left_out_named_and_counted(tmp_path):
    class Wordy(Pages):
        """The second question does not fit into the context, the third answer not into the limit."""

        def __getitem__(self, index):
            record = super().__getitem__(index)
            question, answer = record.turns
            if index == 1:
                question = replace(question, text="<image>" + "why " * 300)
            if index == 2:
                answer = replace(answer, text="red " * 9)
            return replace(record, turns=(question, answer), facts=("red",), kind="one")

    callback = validation(4, samples=6)
    callback.source = Wordy()
    with pytest.warns(UserWarning, match="2 samples will not be asked in evaluation. sample 'page 1': its question"):
        fit(tmp_path, callback)
    assert callback.last_results is not None
    assert [record.key for record in callback.last_results.records] == [f"page {i}" for i in (0, 3, 4, 5)]
    first, second = callback.last_results.not_asked
    assert "page 1': its question takes" in first
    assert "Set evaluation.max_new_tokens=" in second


def test_what_a_template_puts_after_its_end_takes_no_room():
    processor = small_processor()
    processor.template = replace(processor.template, assistant_suffix=f"{TOKENIZER.eos_token}\n")
    require_room(processor, Pages(), EvaluationConfig(name="small", max_new_tokens=9))
