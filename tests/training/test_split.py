"""Where a step's time goes: every part has its share, and the run does not notice."""

import time
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from small_run import FROZEN, PRETRAIN, SCRATCH, STACKED, Pages, small_module, small_processor, small_trainer

from deepstack_pl.data.config import DataConfig
from deepstack_pl.stacking.config import Host, ModelConfig
from deepstack_pl.training import split as training_split
from deepstack_pl.training.clock import PARTS, seconds_by_part
from deepstack_pl.training.config import Checkpointing, StageConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.sharding import checkpoint_activations
from deepstack_pl.training.split import StepSplit

FINETUNE = StageConfig(name="finetune", vision=FROZEN)
ONLY_HEAD = StageConfig(name="llm", vision=FROZEN, projector=FROZEN)


def fit(folder: Any, *callbacks: lightning.Callback, module: DeepStackModule | None = None, **data: Any) -> Any:
    config = DataConfig(name="x", batch_size=4, workers=0, **data)
    source = DeepStackDataModule(Pages(), Pages(4), small_processor(), config, 0, 4)
    module = module or small_module(steps=4)
    accumulation = config.accumulation(1)
    trainer = small_trainer(folder, 4, callbacks=list(callbacks), accumulate_grad_batches=accumulation)
    trainer.fit(module, datamodule=source)
    return module


@pytest.mark.parametrize("stage", [SCRATCH, PRETRAIN, FINETUNE, ONLY_HEAD], ids=lambda stage: stage.name)
def test_every_part_of_a_step_takes_time(stage: StageConfig, tmp_path: Any) -> None:
    split = StepSplit(every_steps=2)
    start = time.perf_counter()
    fit(tmp_path, split, module=small_module(stage=stage, steps=4), micro_batch_size=2)
    passed = time.perf_counter() - start
    assert set(split.last) == set(PARTS)
    assert all(seconds > 0 for seconds in split.last.values())
    assert sum(split.last.values()) < passed


class Slow(lightning.Callback):
    """Makes one place of a step slow."""

    def __init__(self, place: str) -> None:
        self.place = place

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        network = pl_module.network
        places = {
            "vision": network.vision_tower.tower.blocks[1],
            "projector": network.projector,
            "llm": network.get_decoder().layers[3],
            "loss": network.get_output_embeddings(),
        }

        def slowly(module: Any, args: Any, output: torch.Tensor) -> None:
            time.sleep(0.1)
            if output.requires_grad:
                output.register_hook(lambda gradient: time.sleep(0.2))

        if self.place in places:
            places[self.place].register_forward_hook(slowly)

    def on_before_optimizer_step(self, *args: Any) -> None:
        if self.place == "optimiser":
            time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "stage", "least"),
    [
        ("vision", SCRATCH, 0.3),
        ("projector", SCRATCH, 0.3),
        ("llm", SCRATCH, 0.3),
        ("loss", SCRATCH, 0.3),
        ("optimiser", SCRATCH, 0.3),
        ("vision", PRETRAIN, 0.1),
        ("projector", PRETRAIN, 0.3),
        ("llm", ONLY_HEAD, 0.3),
    ],
)
def test_what_is_slow_is_named(place: str, stage: StageConfig, least: float, tmp_path: Any) -> None:
    """Against the same step without: the tests' machine may be slow anywhere, but not by as much in one place alone."""
    split = StepSplit(every_steps=4)
    fit(tmp_path, split, Slow(place), module=small_module(stage=stage, steps=4))
    assert split.last[place] >= least
    assert max(split.last, key=lambda part: split.last[part]) == place


@pytest.mark.parametrize("plan", [STACKED, ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0)])
def test_the_weights_are_those_of_a_run_that_is_not_measured(plan: ModelConfig, tmp_path: Any) -> None:
    def weights(*callbacks: lightning.Callback) -> dict[str, torch.Tensor]:
        config = DataConfig(name="x", batch_size=4, workers=0)
        source = DeepStackDataModule(Pages(), Pages(4), small_processor(plan), config, 0, 4)
        module = small_module(plan, steps=4)
        module.configure_model()
        checkpoint_activations(module.network, Checkpointing.full)
        small_trainer(tmp_path, 4, callbacks=list(callbacks)).fit(module, datamodule=source)
        return module.network.state_dict()

    split = StepSplit(every_steps=1)
    measured, plain = weights(split), weights()
    assert all(torch.equal(measured[name], value) for name, value in plain.items())
    assert all(seconds > 0 for seconds in split.last.values())


def test_between_measured_steps_nothing_is_watched(tmp_path: Any) -> None:
    split = StepSplit(every_steps=4)
    hooked: list[bool] = []

    class Look(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            hooked.append(bool(pl_module.network.vision_tower._forward_hooks))

    module = fit(tmp_path, split, Look())
    assert hooked == [False, False, False, True]
    assert not module.network.vision_tower._forward_hooks


def test_what_is_left_of_the_backward_pass_is_the_part_whose_gradient_was_to_come() -> None:
    forward = ["start", "vision begins", "vision", "decoder begins", "decoder", "forward"]
    for arrived, last in (
        ([], "loss"),
        (["gradient of hidden"], "llm"),
        (["gradient of hidden", "gradient of embeddings"], "projector"),
        (["gradient of hidden", "gradient of embeddings", "gradient of features"], "vision"),
    ):
        marks = [(name, float(at)) for at, name in enumerate([*forward, *arrived])]
        spent = seconds_by_part([*marks, ("backward", marks[-1][1] + 100)], waited=7.0)
        assert spent[last] >= 100
        assert sum(spent.values()) == 7 + marks[-1][1] + 100


def test_of_two_unequal_processes_there_is_the_mean_the_least_and_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dict.fromkeys(PARTS, 1.0) | {"data": 4.0}
    other = dict.fromkeys(PARTS, 3.0) | {"data": 0.0}
    logged: dict[str, float] = {}
    split = StepSplit(every_steps=1)
    clock: Any = SimpleNamespace(watching=True, mark=lambda name: None, read=lambda waited: mine)
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.update(values))
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, loggers=[logger], global_step=1)
    nothing: Any = None
    split._clock = clock
    monkeypatch.setattr(training_split, "from_all", lambda own: [own, other])
    monkeypatch.setattr(training_split, "several", lambda: True)
    split.on_train_batch_end(trainer, nothing, nothing, nothing, 0)
    assert split.last == dict.fromkeys(PARTS, 2.0)
    for part in PARTS:
        each = [mine[part], other[part]]
        assert [logged[f"{name}/{part}"] for name in ("split", "split_min", "split_max")] == [2, min(each), max(each)]


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="every_steps=0"):
        StepSplit(every_steps=0)
