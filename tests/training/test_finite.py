"""A loss or a gradient that is no number changes no weight."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from small_run import Pages, small_model, small_module, small_processor, small_trainer

from deepstack_pl.data.config import DataConfig
from deepstack_pl.training.config import NonFinite, OptimConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.finite import NotFinite
from deepstack_pl.training.guard import FirstStepGuard
from deepstack_pl.training.ledger import Ledger


class Spoils(lightning.Callback):
    """An infinite gradient, under a loss as ever, in the steps ``at``."""

    def __init__(self, *at: int) -> None:
        self.at = at

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step in self.at:
            pl_module.network.projector[0].weight.grad[0, 0] = float("inf")


class Weights(lightning.Callback):
    """The projector's before every step and at the end."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.network.projector[0].weight.detach().clone())


def fit(folder: Path, *at: int, **optim: Any) -> tuple[Any, Weights]:
    module, config = small_module(steps=6, **optim), DataConfig(name="x", batch_size=2, workers=0)
    data = DeepStackDataModule(Pages(), Pages(4), small_processor(), config, 0, 6, ledger=Ledger(folder))
    weights = Weights()
    small_trainer(folder, 6, callbacks=[FirstStepGuard(), Spoils(*at), weights]).fit(module, datamodule=data)
    return module, weights


def test_an_infinite_gradient_stops_the_run_and_names_step_samples_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"step 4: the loss is \d.* norm of the gradients inf\. No weight .*page \d.*"):
        fit(tmp_path, 3)


def test_a_skipped_step_changes_nothing_and_the_next_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The step is left out"):
        module, weights = fit(tmp_path, 3, nonfinite=NonFinite.skip)
    assert torch.equal(weights.seen[2], weights.seen[3])
    assert not torch.equal(weights.seen[3], weights.seen[4])
    ((step, keys),) = module.skipped
    assert step == 3
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "key": key, "what": "left out, not finite"} for key in keys]


def test_a_first_step_that_is_skipped_is_no_fault_of_the_stage(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The step is left out"):
        module, weights = fit(tmp_path, 0, 1, nonfinite=NonFinite.skip)
    assert [step for step, _ in module.skipped] == [0, 1]
    assert not torch.equal(weights.seen[-1], small_model().projector[0].weight)


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NotFinite, match=r"1 steps were .*max_skipped=1"):
        fit(tmp_path, 3, 4, nonfinite=NonFinite.skip, max_skipped=1)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.max_skipped=-1"):
        OptimConfig(name="adamw", max_skipped=-1)
