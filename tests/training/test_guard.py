"""The first step's guard: what it lets pass and what it stops."""

from dataclasses import replace

import lightning
import pytest
import torch
from small_run import FROZEN, PRETRAIN, SCRATCH, Pages, small_module, small_processor, small_trainer
from torch import nn

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data.config import DataConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.guard import FirstStepGuard, digests


class Meddler(lightning.Callback):
    """Does something to the model, or to the optimiser, just before it steps."""

    def __init__(self, deed):
        self.deed = deed

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.deed(pl_module.network, optimizer)


def fit(folder, module, *callbacks, pages=None):
    data = DeepStackDataModule(
        pages or Pages(), Pages(4), small_processor(), DataConfig(name="x", batch_size=4, workers=0), 0, 4
    )
    small_trainer(folder, callbacks=list(callbacks)).fit(module, datamodule=data)


@pytest.mark.parametrize("stage", [PRETRAIN], ids=["pretrain"])
@pytest.mark.parametrize("warm_up", [0.0, 0.5])
def test_a_sound_run_passes_at_the_first_step_that_moves(tmp_path, stage, warm_up):
    guard = FirstStepGuard()
    fit(tmp_path, small_module(stage=stage, warmup_ratio=warm_up), guard)
    assert guard.done


class Words(Pages):
    """Pages of which only those that are ``shown`` have an image."""

    shown = ()

    def __getitem__(self, index):
        page = super().__getitem__(index)
        if page.key in self.shown:
            return page
        question = Turn(Role.user, "Which colours?")
        return replace(page, turns=(question, page.turns[1]), images=())


def words_until(step, folder):
    """Text alone, but for the images of batch ``step``, counted from 0."""
    words, keys = Words(), []

    class Keys(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            keys.append(batch.keys)

    fit(folder, small_module(warmup_ratio=0.0), Keys(), pages=words)
    words.shown = tuple(keys[step])
    return words


def still(part, steps):
    """Holds ``part`` where it is, and notes each step."""

    def stop(model, optimizer):
        steps.append(None)
        for group in optimizer.param_groups:
            group["lr"] *= group["part"] != part

    return Meddler(stop)


def test_steps_of_text_alone_prove_nothing_of_the_vision_path_and_stop_no_run(tmp_path):
    guard = FirstStepGuard()
    fit(tmp_path / "a", small_module(warmup_ratio=0.0), guard, pages=Words())
    assert not guard.done, "no step held an image"
    fit(tmp_path / "c", small_module(warmup_ratio=0.0), guard, pages=words_until(2, tmp_path / "b"))
    assert guard.done


def test_a_step_of_text_alone_proves_the_llm_and_what_is_frozen(tmp_path):
    def write(model, optimizer):
        with torch.no_grad():
            next(model.vision_tower.parameters()).add_(1.0)

    steps = []
    with pytest.raises(RuntimeError, match=r"trained part 'llm' changed in the first step with .* above zero: "):
        fit(tmp_path, small_module(warmup_ratio=0.0), FirstStepGuard(), still("llm", steps), pages=Words())
    assert len(steps) == 1
    stage = replace(SCRATCH, vision=FROZEN)
    with pytest.raises(RuntimeError, match=r"1 frozen parameters changed.*vision_tower"):
        fit(tmp_path, small_module(stage=stage, warmup_ratio=0.0), FirstStepGuard(), Meddler(write), pages=Words())


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_the_vision_path_must_move_at_the_first_image_after_text(tmp_path, part):
    steps, words = [], words_until(2, tmp_path / "a")
    with pytest.raises(RuntimeError, match=f"trained part '{part}' changed in the first step .* and an image: "):
        fit(tmp_path / "b", small_module(warmup_ratio=0.0), FirstStepGuard(), still(part, steps), pages=words)
    assert len(steps) == 3


def test_a_trainable_parameter_without_a_gradient_is_named(tmp_path):
    module = small_module()
    module.configure_model()
    module.network.projector.register_parameter("stray", nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match=r"1 trainable parameters have no gradient.*: projector\.stray\. Freeze"):
        fit(tmp_path, module, FirstStepGuard())


def test_a_frozen_parameter_that_changes_is_named(tmp_path):
    def write(model, optimizer):
        with torch.no_grad():
            model.language_model.lm_head.weight[3, 3] += 1e-3

    with pytest.raises(RuntimeError, match=r"1 frozen parameters changed.*language_model\.lm_head\.weight"):
        fit(tmp_path, small_module(stage=PRETRAIN, warmup_ratio=0.0), FirstStepGuard(), Meddler(write))


def test_a_trained_part_that_stands_still_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no parameter of the trained part 'llm' changed"):
        fit(tmp_path, small_module(warmup_ratio=0.0), FirstStepGuard(), still("llm", []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_changed_bit_changes_the_digest(dtype):
    before = nn.Parameter(torch.randn(5, 7, dtype=dtype))
    after = nn.Parameter(before.detach().clone())
    assert digests([("w", before)])["w"] == digests([("w", after)])["w"]
    with torch.no_grad():
        after[4, 6] = torch.nextafter(after[4, 6], after.new_tensor(9.0))
    assert digests([("w", before)])["w"] != digests([("w", after)])["w"]
