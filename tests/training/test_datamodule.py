"""Where a run goes on: the datamodule's plain numbers, the checkpoint around them, and Ctrl-C."""

import json
import os
import re
import signal
import threading
import warnings
from dataclasses import replace
from itertools import chain

import lightning
import numpy as np
import pytest
import torch
from small_run import Pages, newest, saved, small_model, small_module, small_processor, small_trainer

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data.config import Batching, DataConfig, Remainder, Shuffle
from deepstack_pl.language.config import TooLong
from deepstack_pl.training import store
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.checkpoints import all_of
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.interrupt import GracefulStop
from deepstack_pl.training.restore import read_model
from deepstack_pl.training.step_loss import StepLoss
from deepstack_pl.training.store import SaveFailed
from deepstack_pl.training.tally import Tally


class Keys(lightning.Callback):
    """Which samples each step trained on; ``then`` is called with each step's number once it is done."""

    def __init__(self, then=lambda step: None):
        self.seen, self.then = [], then

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch.keys)
        self.then(trainer.global_step)


def data(steps=6, workers=0, seed=0, batch_size=4, pages=None, ledger=None, **config):
    config = DataConfig(name="x", batch_size=batch_size, workers=workers, **config)
    return DeepStackDataModule(pages or Pages(), Pages(4), small_processor(), config, seed, steps, ledger=ledger)


def fit(folder, *callbacks, steps=6, resume=None, datamodule=None, **more):
    module, datamodule = small_module(steps=steps), datamodule or data(steps)
    more = {"accumulate_grad_batches": datamodule.config.accumulation(), **more}
    saves = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
    trainer = small_trainer(folder, steps, callbacks=list(callbacks), enable_checkpointing=saves, **more)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    return module, trainer


def order_of(folder, steps=6, config=None, **more):
    datamodule = data(steps, **(config or {}))
    fit(folder, steps=steps, datamodule=datamodule, **more)
    return datamodule.tally().order


def state_of(folder):
    return saved(folder)["DeepStackDataModule"]


def interrupt_after(step, stop=None):
    return Keys(lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_fit_returns(tmp_path):
    stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
    _, trainer = fit(tmp_path, interrupt_after(3), stop, RunCheckpoint(tmp_path, every_steps=100))
    assert stop.interrupted
    assert trainer.global_step == 3
    assert saved(tmp_path)["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_raises_at_once():
    stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
    stop.on_train_start(None, None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_of_a_machine_that_is_wanted_ends_training_at_once_with_143(number, first, tmp_path):
    done = []

    class Twice(lightning.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, Twice(), Keys(done.append), GracefulStop())
    assert ended.value.code == 143
    assert done == [1], "the step that it came in was not waited for"
    assert signal.getsignal(number) is before


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
    _, trainer = fit(tmp_path, keys, stop, checkpoint, steps=6, datamodule=data(6, micro_batch_size=2))
    assert (trainer.global_step, len(keys.seen)) == (2, 4)
    assert state_of(tmp_path)["position"]["step"] == 2


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
        resume=newest(tmp_path / "b"),
        datamodule=going_on,
    )
    assert trainer.global_step == 6
    assert first.seen + second.seen == whole.seen
    assert going_on.tally() == at_once.tally() != Tally()
    saved = state_of(tmp_path / "b")
    assert (saved["position"]["step"], saved["tally"]) == (6, at_once.tally().to_dict())
    for (name, a), b in zip(straight.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b), name


class Dropout(lightning.Callback):
    """Dropout in every layer, and the losses to the last bit."""

    def __init__(self, share=0.3):
        self.losses, self.share = [], share

    def on_fit_start(self, trainer, pl_module):
        for layer in pl_module.network.language_model.get_decoder().layers:
            layer.self_attn.attention_dropout = self.share

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item().hex())


def test_a_rerun_has_the_same_samples_losses_and_weights_to_the_last_bit_with_dropout_on(tmp_path):
    runs = {}
    for name, share, values in (
        ("one", 0.3, {}),
        ("again", 0.3, {"workers": 1}),
        ("plain", 0.0, {}),
        ("else", 0.3, {"seed": 1}),
    ):
        torch.manual_seed(len(runs))  # whatever has drawn numbers before
        keys, losses = Keys(), Dropout(share)
        module, _ = fit(tmp_path / name, keys, losses, datamodule=data(**values))
        runs[name] = keys.seen, losses.losses, [p.detach().clone() for p in module.network.parameters()]
    one, again, plain, other = runs.values()
    assert one[:2] == again[:2]
    assert all(torch.equal(a, b) for a, b in zip(one[2], again[2], strict=True))
    assert (one[0] == plain[0], one[1] == plain[1]) == (True, False), "dropout is on"
    assert one[0] != other[0]


def test_stopped_after_any_step_it_goes_on_as_if_it_had_not_been(tmp_path):
    whole, straight = Keys(), Dropout()
    end, _ = fit(tmp_path / "whole", whole, straight)
    assert len(set(straight.losses)) == 6
    for step in range(1, 6):
        folder = tmp_path / str(step)
        keys, losses = (interrupt_after(step), Keys()), (Dropout(), Dropout())
        fit(folder, keys[0], losses[0], GracefulStop(), RunCheckpoint(folder))
        resumed, _ = fit(folder, keys[1], losses[1], RunCheckpoint(folder), resume=newest(folder))
        assert keys[0].seen + keys[1].seen == whole.seen
        assert losses[0].losses + losses[1].losses == straight.losses
        for (name, a), b in zip(end.network.named_parameters(), resumed.network.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_state_is_plain_numbers_of_what_was_trained_and_not_of_what_was_fetched(tmp_path):
    fit(tmp_path, interrupt_after(2), GracefulStop(), RunCheckpoint(tmp_path), datamodule=data(workers=1))
    state = state_of(tmp_path)
    assert state["position"] == {"step": 2, "epoch": 0, "window": 0, "unit": 8}
    assert state["tally"]["samples"] == 8
    assert state["tally"]["order"] == order_of(tmp_path / "two", steps=2)
    assert state["identity"]["data.batch_size"] == 4
    assert json.loads(json.dumps(state)) == state


class Wordy(Pages):
    """Every fourth page has a question so long that a cut leaves nothing of its answer."""

    def __getitem__(self, index):
        page = super().__getitem__(index)
        question = "<image>Which colours " + "and which again " * 20 * (index % 4 == 0)
        return replace(page, turns=(Turn(Role.user, question), page.turns[-1]))


def test_what_is_cut_off_is_counted_over_a_resume_positions_and_whole_answers(tmp_path):
    def cutting():
        datamodule = data(pages=Wordy(), max_cut=1.0)
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
    fit(tmp_path / "b", rest, resume=newest(tmp_path / "b"), datamodule=going_on)
    trained = [key for keys in first.seen + rest.seen for key in keys]
    for datamodule in (whole, going_on):
        tally = datamodule.tally()
        assert tally.cut_positions == sum(positions[key] for key in trained) > 0
        assert tally.cut_samples == sum(positions[key] > 0 for key in trained)
        assert tally.cut_answers == sum(answers[key] for key in trained) > 0
    batch = whole.processor.collate([whole.processor.prepare(Wordy()[index]) for index in (0, 4)])
    module.zero_grad()
    loss = StepLoss().add(module.network(**batch.training_inputs(), use_cache=False).losses, batch)
    loss.backward()
    assert loss == 0, "a batch of which the cut left nothing to learn"
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in module.network.parameters())


def test_the_order_is_of_the_steps_trained_and_not_of_what_settings_promise(tmp_path):
    changes = [{}, {"config": {"seed": 1}}, {"steps": 3}, {"config": {"batch_size": 6}}]
    orders = [order_of(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    assert order_of(tmp_path / "again") == orders[0]
    assert len({*orders, 0}) == 5


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_smaller_forwards_of_the_same_step_are_the_same_order_and_a_resume_may_change_them(tmp_path, micro):
    whole, first, second = Keys(), interrupt_after(1), Keys()
    at_once, broken_off, going_on = data(3), data(3, micro_batch_size=micro), data(3)
    fit(tmp_path / "a", whole, steps=3, datamodule=at_once)
    fit(tmp_path / "b", first, GracefulStop(), RunCheckpoint(tmp_path / "b"), steps=3, datamodule=broken_off)
    assert len(first.seen) == 4 // micro
    fit(tmp_path / "b", second, resume=newest(tmp_path / "b"), steps=3, datamodule=going_on)
    assert list(chain.from_iterable(first.seen + second.seen)) == list(chain.from_iterable(whole.seen))
    assert going_on.tally() == at_once.tally()


def test_a_batch_whose_gradient_is_lost_has_not_been_trained_on(tmp_path):
    keys, datamodule = Keys(), data(micro_batch_size=2)

    def fail(step):
        if len(keys.seen) == 3:
            raise RuntimeError("as arranged")

    keys.then = fail
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, keys, RunCheckpoint(tmp_path), datamodule=datamodule)
    assert state_of(tmp_path)["position"]["step"] == datamodule.step == 1


def test_another_fit_begins_anew(tmp_path):
    datamodule = data()
    found = []
    for folder in ("a", "b"):
        fit(tmp_path / folder, datamodule=datamodule)
        found.append((datamodule.step, datamodule.tally()))
    assert found[0] == found[1]


def test_a_trainer_that_accumulates_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2.*data\.batch_size=4.* are 1"):
        fit(tmp_path, steps=2, accumulate_grad_batches=2)


@pytest.mark.parametrize("version", [1, 3, None])
def test_a_checkpoint_of_another_version_is_refused(version):
    state = data().state_dict() | {"version": version}
    with pytest.raises(ValueError, match=rf"version {version}, this program reads 2.*init_from"):
        data().load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"seed=0, this run has 1.*init_from"),
        ({"batch_size": 2}, r"data\.batch_size=4, this run has 2"),
        ({"pages": Pages(fingerprint="else")}, r"not those of the checkpoint: pages \(has other bytes\); 1 of 1"),
        ({"batching": Batching.modality_length}, r"data\.batching=samples, this run has modality_length"),
        ({"shuffle": Shuffle.blocks}, r"data\.shuffle=full, this run has blocks"),
        ({"remainder": Remainder.drop}, r"data\.remainder=pad, this run has drop"),
    ],
    ids=["seed", "batch_size", "fingerprint", "batching", "shuffle", "remainder"],
)
def test_going_on_with_another_order_of_samples_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        data(**other).load_state_dict(data().state_dict())


def test_the_last_checkpoint_is_of_the_last_step_whatever_the_interval(tmp_path):
    fit(tmp_path, RunCheckpoint(tmp_path, every_steps=4))
    assert [checkpoint.step for checkpoint in all_of(tmp_path)] == [6, 4]
    assert saved(tmp_path)["global_step"] == 6
    weights, fresh = read_model(all_of(tmp_path)[0]), small_model().state_dict()
    assert weights.keys() == fresh.keys()
    assert not torch.equal(weights["projector.0.weight"], fresh["projector.0.weight"])


def test_the_step_before_an_exception_is_saved(tmp_path):
    def fail(step):
        if step == 5:
            raise RuntimeError("as arranged")

    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, Keys(fail), RunCheckpoint(tmp_path, every_steps=2))
    assert [checkpoint.step for checkpoint in all_of(tmp_path)] == [5, 4]


def test_nothing_is_saved_of_an_update_that_an_exception_broke_off(tmp_path):
    class Fails(lightning.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.lightning_module.updating = True  # as in the middle of AdamW's step
                raise RuntimeError("as arranged")

    with pytest.raises(RuntimeError, match="as arranged"):
        fit(tmp_path, Fails(), RunCheckpoint(tmp_path, every_steps=2))
    assert [checkpoint.step for checkpoint in all_of(tmp_path)] == [2]


def fit_on_a_bad_disk(folder, bad, monkeypatch, *callbacks, every_steps=1, asynchronous):
    """Six steps; saves whose number is in ``bad`` are not written. Which steps were trained, what ended training, and
    what was said.
    """
    real, calls, trained = store.dcp.save, [], []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) in bad:
            raise OSError("no disk")
        return real(*args, **kwargs)

    monkeypatch.setattr(store.dcp, "save", save)
    ended = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            checkpoint = RunCheckpoint(folder, every_steps=every_steps, asynchronous=asynchronous)
            fit(folder, Keys(trained.append), *callbacks, checkpoint)
        except (RuntimeError, ZeroDivisionError) as error:
            ended = error
    return trained, ended, [str(one.message) for one in said]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_or_two_saves_that_fail_in_a_row_let_training_go_on(tmp_path, monkeypatch, asynchronous):
    trained, ended, said = fit_on_a_bad_disk(tmp_path, {1, 2, 4, 5}, monkeypatch, asynchronous=asynchronous)
    assert (trained, ended) == ([1, 2, 3, 4, 5, 6], None)
    told = [line for line in said if "Training goes on; the next checkpoint is due in 1 steps" in line]
    assert [re.findall(r"step (\d) was not written", line) for line in told] == [["1"], ["2"], ["4"], ["5"]]
    assert [checkpoint.step for checkpoint in all_of(tmp_path)] == [6, 3]


@pytest.mark.parametrize(("asynchronous", "heard"), [(True, 6), (False, 5)])
def test_the_third_save_that_fails_in_a_row_ends_the_run(tmp_path, monkeypatch, asynchronous, heard):
    trained, ended, _ = fit_on_a_bad_disk(tmp_path, {1, 3, 4, 5}, monkeypatch, asynchronous=asynchronous)
    assert isinstance(ended, SaveFailed)
    assert "step 5 was not written" in str(ended)
    assert trained == list(range(1, heard + 1)), "one in a thread is heard of at the next"
    assert [checkpoint.step for checkpoint in all_of(tmp_path)] == [2]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("every_steps", "first_bad"), [(3, 2), (4, 2), (100, 1)])
def test_a_last_save_that_fails_ends_the_run(tmp_path, monkeypatch, every_steps, first_bad, asynchronous):
    bad = set(range(first_bad, 10))
    trained, ended, _ = fit_on_a_bad_disk(
        tmp_path, bad, monkeypatch, every_steps=every_steps, asynchronous=asynchronous
    )
    assert isinstance(ended, SaveFailed)
    assert "step 6 was not written" in str(ended)
    assert trained == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("asynchronous", "bad"), [(True, {1, 2, 3, 4}), (False, {2, 3, 4})])
def test_a_save_after_an_exception_that_fails_is_said_and_does_not_hide_it(tmp_path, monkeypatch, asynchronous, bad):
    """Though it is the third in a row."""

    def fail(step):
        if step == 4:
            raise ZeroDivisionError("as arranged")

    _, ended, said = fit_on_a_bad_disk(tmp_path, bad, monkeypatch, Keys(fail), asynchronous=asynchronous)
    assert isinstance(ended, ZeroDivisionError)
    assert any("step 4 was not written" in line for line in said)


def test_a_checkpoint_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_steps=0"):
        RunCheckpoint(tmp_path, every_steps=0)


def test_what_plans_batches_is_part_of_the_identity():
    lengths = np.arange(1, 13)

    def state(window, budget):
        config = DataConfig(
            name="x", batch_size=2, workers=0, batching=Batching.token_budget, window=window, token_budget=budget
        )
        return DeepStackDataModule(Pages(), Pages(4), small_processor(), config, 0, 6, lengths=lengths)

    there = state(8, 64).state_dict()
    state(8, 64).load_state_dict(there)
    for other, says in ((state(6, 64), r"data\.window=8"), (state(8, 32), r"data\.token_budget=64")):
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(there)
