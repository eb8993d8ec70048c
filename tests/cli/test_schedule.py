"""How long a run is, where it is said in epochs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import Pages
from tiny_run import TINY, run_of

from deepstack_pl.cli.schedule import expected_length, settle_steps
from deepstack_pl.config.load import load, save
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.stream import Stream

EPOCH = ("trainer.max_steps=null", "data.epochs=1")


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (2.5, 6), (0.4, 1), (0.1, 1), (0.7, 1)])
def test_epochs_are_full_batches_of_samples_and_one_step_at_least(epochs: float, steps: int) -> None:
    assert Stream(Pages(10), DataConfig(batch_size=4), 0).steps(epochs) == steps


def test_decimals_mean_what_they_say() -> None:
    assert Stream(Pages(100), DataConfig(batch_size=1), 0).steps(0.29) == 29  # and 0.29 * 100 is less in binary


def test_planned_batches_are_counted() -> None:
    config = DataConfig(batch_size=2, batching=Batching.token_budget, token_budget=20, window=8)
    stream = Stream(Pages(30), config, 0, lengths=np.arange(1, 31) % 9 + 1, capacity=16)
    counts = [len(list(stream.epoch_batches(epoch))) for epoch in (0, 1)]
    assert stream.steps(1) == counts[0]
    assert stream.steps(1.5) == int(counts[0] + counts[1] / 2)


def test_the_steps_take_the_place_of_the_epochs_and_are_saved(tmp_path: Path) -> None:
    run = run_of(*TINY, *EPOCH)
    assert settle_steps(run, Pages(18), None) == 4
    save(run, tmp_path / "config.yaml")
    saved = load(tmp_path / "config.yaml", [])
    assert (saved.trainer["max_steps"], saved.data.epochs) == (4, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("data.epochs=1",), "data.epochs=1 and trainer.max_steps=3: a run has one length"),
        (("trainer.max_steps=null",), "Or say trainer.max_steps=null data.epochs=N"),
        (("trainer.max_steps=null", "data.epochs=0"), "data.epochs=0.0: use more than 0"),
        (
            (*EPOCH, "data=shards", "data.stream=webdataset", "data.urls=x.tar"),
            "nobody knows before the last is read",
        ),
    ],
)
def test_a_run_has_exactly_one_length(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_of(*TINY, *words)


def test_before_the_data_are_open_their_published_size_is_taken() -> None:
    corpus = run_of("data=llava665k", "data.fine_print.view_size=32", *EPOCH)
    assert expected_length(corpus) == "5,195 steps of 128, 1 epoch of 665,042 samples."
    shards = run_of("data=shards", *EPOCH)
    assert expected_length(shards) == "data.epochs=1; how many steps that is, the data say once they are open."
    planned = replace(corpus.data, batching=Batching.token_budget, micro_batch_size=None)
    assert expected_length(replace(corpus, data=planned, trainer={"max_steps": 7})) == (
        "7 steps; how many epochs that is, the data say once they are open."
    )
