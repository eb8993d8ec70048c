"""Where a run goes on: the datamodule's one integer, the checkpoint around it, and Ctrl-C."""

import os
import signal
import threading
from dataclasses import replace

import lightning
import pytest
import torch
from small_run import Pages, small_model, small_module, small_processor, small_trainer

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data.config import DataConfig
from deepstack_pl.language.config import TooLong
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.interrupt import GracefulStop


class Keys(lightning.Callback):
    """Which samples each step trained on; ``then`` is called with each step's number once it is done."""

    def __init__(self, then=lambda step: None):
        self.seen, self.then = [], then

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch.keys)
        self.then(trainer.global_step)


def data(steps=6, workers=0, seed=0, batch_size=4, pages=None):
    config = DataConfig(name="x", batch_size=batch_size, workers=workers)
    return DeepStackDataModule(pages or Pages(), Pages(4), small_processor(), config, seed, steps)


def fit(folder, *callbacks, steps=6, resume=None, datamodule=None, **more):
    module = small_module(steps=steps)
    trainer = small_trainer(folder, steps, callbacks=list(callbacks), enable_checkpointing=True, **more)
    trainer.fit(module, datamodule=datamodule or data(steps), ckpt_path=resume, weights_only=True)
    return module, trainer


def digest_of(folder, steps=6, **more):
    datamodule = data(steps)
    fit(folder, steps=steps, datamodule=datamodule, **more)
    return datamodule.keys_digest


def interrupt_after(step, stop=None):
    return Keys(lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_fit_returns(tmp_path):
    stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
    _, trainer = fit(tmp_path, interrupt_after(3), stop, RunCheckpoint(tmp_path, every_steps=100))
    assert stop.interrupted
    assert trainer.global_step == 3
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_raises_at_once():
    stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
    stop.on_train_start(None, None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_when_training_fails(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def fail(step):
        raise RuntimeError("as arranged")

    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, Keys(fail), GracefulStop())
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_ctrl_c_says_that_it_cannot_help():
    stop = GracefulStop()
    caught = []

    def enter():
        with pytest.warns(UserWarning, match="main thread only"):
            stop.on_train_start(None, None)
        caught.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught == [True]


def test_ctrl_c_inside_an_accumulation_waits_for_its_end(tmp_path):
    stop, checkpoint = GracefulStop(), RunCheckpoint(tmp_path)
    keys = Keys()
    keys.then = lambda now: os.kill(os.getpid(), signal.SIGINT) if len(keys.seen) == 3 else None
    _, trainer = fit(tmp_path, keys, stop, checkpoint, steps=6, accumulate_grad_batches=2, datamodule=data(6))
    assert (trainer.global_step, len(keys.seen)) == (2, 4)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["DeepStackDataModule"]["step"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(tmp_path, workers):
    whole, at_once = Keys(), data(workers=workers)
    straight, _ = fit(tmp_path / "a", whole, datamodule=at_once)
    first, second, going_on = interrupt_after(2), Keys(), data(workers=workers)
    fit(tmp_path / "b", first, GracefulStop(), RunCheckpoint(tmp_path / "b"), datamodule=data(workers=workers))
    resumed, trainer = fit(
        tmp_path / "b",
        second,
        RunCheckpoint(tmp_path / "b"),
        resume=tmp_path / "b" / "last.ckpt",
        datamodule=going_on,
    )
    assert trainer.global_step == 6
    assert first.seen + second.seen == whole.seen
    assert going_on.keys_digest == at_once.keys_digest != ""
    saved = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["DeepStackDataModule"]
    assert (saved["step"], saved["keys_digest"]) == (6, at_once.keys_digest)
    for (name, a), b in zip(straight.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_position_counts_what_was_trained_and_not_what_was_fetched(tmp_path):
    fit(tmp_path, interrupt_after(2), GracefulStop(), RunCheckpoint(tmp_path), datamodule=data(workers=1))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["DeepStackDataModule"]
    digest = state.pop("keys_digest")
    identity = {"fingerprint": "two colours", "seed": 0, "batch_size": 4, "accumulate_grad_batches": 1}
    assert state == {"step": 2, "cut_positions": 0, "cut_answers": 0, **identity}
    assert digest == digest_of(tmp_path / "two", steps=2)


class Wordy(Pages):
    """Every fourth page has a question so long that a cut leaves nothing of its answer."""

    def __getitem__(self, index):
        page = super().__getitem__(index)
        question = "<image>Which colours " + "and which again " * 20 * (index % 4 == 0)
        return replace(page, turns=(Turn(Role.user, question), page.turns[-1]))


def test_what_is_cut_off_is_counted_over_a_resume_positions_and_whole_answers(tmp_path):
    def cutting():
        datamodule = data(pages=Wordy())
        datamodule.processor.max_length, datamodule.processor.too_long = 40, TooLong.cut
        return datamodule

    positions, answers = {}, {}
    for index in range(12):
        sample = cutting().processor.prepare(Wordy()[index])
        positions[sample.key], answers[sample.key] = sample.cut, bool((sample.labels == -100).all())
        assert len(sample.input_ids) <= 40
    assert sum(answers.values()) == 3
    whole, first, going_on, rest = cutting(), interrupt_after(2), cutting(), Keys()
    module, _ = fit(tmp_path / "a", Keys(), datamodule=whole)
    fit(tmp_path / "b", first, GracefulStop(), RunCheckpoint(tmp_path / "b"), datamodule=cutting())
    fit(tmp_path / "b", rest, resume=tmp_path / "b" / "last.ckpt", datamodule=going_on)
    trained = [key for keys in first.seen + rest.seen for key in keys]
    for datamodule in (whole, going_on):
        assert datamodule.cut_positions == sum(positions[key] for key in trained) > 0
        assert datamodule.cut_answers == sum(answers[key] for key in trained) > 0
    batch = whole.processor.collate([whole.processor.prepare(Wordy()[index]) for index in (0, 4)])
    module.trainer, module.log, module.log_dict = None, lambda *a, **k: None, lambda *a, **k: None
    module._rates = dict
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss == 0, "a batch of which the cut left nothing to learn"
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in module.network.parameters())


def test_the_digest_is_of_the_batches_trained_on_and_not_of_what_settings_promise(tmp_path):
    changes = [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 2}, {"steps": 3}]
    digests = [digest_of(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    assert digest_of(tmp_path / "again") == digests[0]
    assert len({*digests, ""}) == 5
    grouped = [digest_of(tmp_path / "b", steps=3, accumulate_grad_batches=2), digests[0]]
    assert grouped[0] != grouped[1], "the same batches in other optimiser steps are another training"


def test_accumulated_batches_are_counted_one_by_one_and_a_resume_goes_on_after_them(tmp_path):
    whole, first, second = Keys(), interrupt_after(1), Keys()
    digest = data(3)
    fit(tmp_path / "a", whole, steps=3, datamodule=digest, accumulate_grad_batches=2)
    fit(tmp_path / "b", first, GracefulStop(), RunCheckpoint(tmp_path / "b"), steps=3, accumulate_grad_batches=2)
    last, going_on = tmp_path / "b" / "last.ckpt", data(3)
    fit(tmp_path / "b", second, resume=last, steps=3, datamodule=going_on, accumulate_grad_batches=2)
    assert first.seen + second.seen == whole.seen
    assert (going_on.step, going_on.keys_digest) == (6, digest.keys_digest)


def test_a_batch_whose_gradient_is_lost_has_not_been_trained_on(tmp_path):
    keys, datamodule = Keys(), data()

    def fail(step):
        if len(keys.seen) == 3:
            raise RuntimeError("as arranged")

    keys.then = fail
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, keys, RunCheckpoint(tmp_path), datamodule=datamodule, accumulate_grad_batches=2)
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)["DeepStackDataModule"]
    assert saved["step"] == datamodule.step == 2


def test_another_fit_begins_anew(tmp_path):
    datamodule = data()
    digests = []
    for folder in ("a", "b"):
        fit(tmp_path / folder, datamodule=datamodule)
        digests.append((datamodule.step, datamodule.keys_digest))
    assert digests[0] == digests[1]


def test_going_on_with_another_accumulation_is_refused(tmp_path):
    fit(tmp_path, RunCheckpoint(tmp_path), steps=1)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=1, this run has 2.*init_from"):
        fit(tmp_path, steps=2, resume=tmp_path / "last.ckpt", accumulate_grad_batches=2)


def test_a_checkpoint_without_its_position_is_refused():
    state = data().state_dict()
    del state["keys_digest"]
    with pytest.raises(ValueError, match=r"does not say its keys_digest.*init_from"):
        data().load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"seed=0, this run has 1.*init_from"),
        ({"batch_size": 2}, r"data\.batch_size=4, this run has 2"),
        ({"pages": Pages(fingerprint="else")}, r"data fingerprint=two colours, this run has else"),
    ],
    ids=["seed", "batch_size", "fingerprint"],
)
def test_going_on_with_another_order_of_samples_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        data(**other).load_state_dict(data().state_dict())


def test_the_last_checkpoint_is_of_the_last_step_whatever_the_interval(tmp_path):
    fit(tmp_path, RunCheckpoint(tmp_path, every_steps=4))
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    names = {f"model.{name}" for name in small_model().state_dict()}
    assert set(saved["state_dict"]) == names


def test_an_exception_is_saved_beside_the_last_good_checkpoint(tmp_path):
    def fail(step):
        if step == 5:
            raise RuntimeError("as arranged")

    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, Keys(fail), RunCheckpoint(tmp_path, every_steps=2))
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in tmp_path.glob("*.ckpt")}
    assert steps == {"last.ckpt": 4, "exception.ckpt": 5}


def test_a_checkpoint_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_steps=0"):
        RunCheckpoint(tmp_path, every_steps=0)
