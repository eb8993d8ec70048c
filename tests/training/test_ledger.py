"""What is not trained on: a row of weight nothing, a line in the ledger, a number in TensorBoard, and a limit."""

import json
from dataclasses import replace
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from small_run import Pages, newest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datamodule import Keys, data, fit, interrupt_after

from deepstack_pl.batch import Reason, Refused, Role, Turn
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.counts import DataCounts
from deepstack_pl.training.interrupt import GracefulStop
from deepstack_pl.training.ledger import Ledger
from deepstack_pl.training.tally import Tally


class Spoilt(Pages):
    """Of twelve pages one cannot be read, and one answer is too long; colours are the sources."""

    def __getitem__(self, index):
        page = super().__getitem__(index)
        page = replace(page, source=("warm", "cold")[index % 2])
        if index == 5:
            raise Refused(Reason.image, f"{page.key}: cannot read this image. Fetch it again.")
        if index == 7:
            answer = "red " * 300
            return replace(page, turns=(page.turns[0], Turn(Role.assistant, answer)))
        return page


def spoilt(folder, **more):
    more = {"max_refused": 0.1, "max_cut": 0.1, **more}
    return data(pages=Spoilt(), ledger=Ledger(folder), **more)


def lines(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_sample_keeps_its_row_and_every_one_is_a_line_and_a_number(tmp_path, workers):
    keys, datamodule = Keys(), spoilt(tmp_path, workers=workers)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, keys, DataCounts(), datamodule=datamodule, logger=logger)
    assert all(len(batch) == 4 for batch in keys.seen)
    assert sorted(chain(*keys.seen)) == sorted(2 * [f"page {i}" for i in range(12)]), "two epochs, nothing lost"
    found = lines(tmp_path)
    assert [line["key"] for line in found if line["what"] == "refused"] == 2 * ["page 5"]
    assert [line["key"] for line in found if line["what"] == "cut"] == 2 * ["page 7"]
    step = next(i for i, batch in enumerate(keys.seen) if "page 5" in batch)
    refused = next(line for line in found if line["what"] == "refused")
    says = "page 5: cannot read this image. Fetch it again."
    assert refused == {
        "step": step, "key": "page 5", "source": "", "what": "refused", "reason": "image", "sentence": says,
    }  # fmt: skip
    tally = datamodule.tally()
    assert (tally.samples, tally.refused, tally.cut_samples) == (22, {"image": 2}, 2)
    assert tally.sources == {"warm": 12, "cold": 10}
    assert tally.cut_positions == sum(line["positions"] for line in found if line["what"] == "cut") > 0
    events = EventAccumulator(str(tmp_path)).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert (last["data/refused"], last["data/refused/image"], last["data/cut_samples"]) == (2, 2, 2)
    assert (last["data/samples/warm"], last["data/samples/cold"]) == (12, 10)
    assert last["train/loss/warm"] > 0


def test_counts_are_logged_every_so_many_steps_and_never_within_one(tmp_path):
    datamodule, logger = spoilt(tmp_path, micro_batch_size=2), TensorBoardLogger(tmp_path, name="", version="")
    seldom = LambdaCallback(on_fit_start=lambda trainer, module: setattr(trainer, "log_every_n_steps", 2))
    fit(tmp_path, seldom, DataCounts(), datamodule=datamodule, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    samples, refused = events.Scalars("data/samples"), events.Scalars("data/refused")
    assert [event.step for event in samples] == [2, 4, 6]
    assert [trained.value + gone.value for trained, gone in zip(samples, refused, strict=True)] == [8, 16, 24]


def test_the_first_refused_sample_stops_a_run_that_allows_none_and_stands_in_the_ledger(tmp_path):
    told = r"1 of 12 samples refused, more than data\.max_refused=0\.0 .*page 5: cannot read.*raise data\.max_refused"
    with pytest.raises(ValueError, match=told):
        fit(tmp_path, datamodule=spoilt(tmp_path, max_refused=0.0))
    assert [line["key"] for line in lines(tmp_path) if line["what"] == "refused"] == ["page 5"]


def test_too_many_cuts_stop_a_run_and_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 12 samples cut.*page 7 \(\d+ positions\).*Raise llm\.max_length"):
        fit(tmp_path, datamodule=spoilt(tmp_path, max_cut=0.05))


def test_the_limit_is_a_share_of_an_epoch_and_grows_with_what_is_seen(tmp_path):
    fit(tmp_path, datamodule=spoilt(tmp_path, max_refused=1 / 12, max_cut=1 / 12, steps=30), steps=30)


def test_going_on_writes_the_lines_of_its_steps_once(tmp_path):
    whole, broken_off = tmp_path / "a", tmp_path / "b"
    fit(whole, datamodule=spoilt(whole))
    keys = Keys()
    fit(broken_off, keys, RunCheckpoint(broken_off, every_steps=2), datamodule=spoilt(broken_off))
    first = interrupt_after(2)
    fit(tmp_path / "c", first, GracefulStop(), RunCheckpoint(tmp_path / "c"), datamodule=spoilt(tmp_path / "c"))
    going_on = spoilt(broken_off)  # as after a kill: its ledger already holds later steps than the checkpoint
    fit(broken_off, resume=newest(tmp_path / "c"), datamodule=going_on)
    assert lines(broken_off) == lines(whole)
    assert going_on.tally().refused == {"image": 2}


def test_a_line_that_a_kill_cut_off_goes_and_swallows_no_other(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.file(0).write_text('{"step": 1, "key": "a"}\n{"step": 2, "key": "b"}\n{"step": 2, "ke')
    ledger.go_back(2)
    assert [line["key"] for line in lines(tmp_path)] == ["a"]
    processor = data().processor
    ledger.write(processor.collate([processor.blank("page 5", "", (Reason.image, "no"))]), 2, 0)
    assert [line["key"] for line in lines(tmp_path)] == ["a", "page 5"]


def test_tallies_add_up_however_samples_are_spread():
    datamodule = data()
    samples = [datamodule.processor.prepare(Spoilt()[i]) for i in (0, 1, 2, 3)]
    samples += [datamodule.processor.blank("page 5", "cold", (Reason.image, "no")), datamodule.processor.blank()]
    whole = Tally.of(datamodule.processor.collate(samples), 3)
    parts = [Tally.of(datamodule.processor.collate(part), 3) for part in (samples[4:], samples[:1], samples[1:4])]
    assert sum(parts, Tally()) == whole == Tally.from_dict(whole.to_dict())
    assert (whole.samples, whole.refused, whole.seen) == (4, {"image": 1}, 5)
    assert whole.order != Tally.of(datamodule.processor.collate(samples), 4).order
    refused = datamodule.processor.blank("page 0", "warm", (Reason.image, "no"))
    assert Tally.of(datamodule.processor.collate([refused, *samples[1:]]), 3).order != whole.order
    assert torch.tensor(whole.order).item() == whole.order, "an integer of 64 bits"
