"""The stream: what is read is a function of (seed, step), whoever reads it."""

import os
import pickle
import signal
from collections import Counter
from itertools import chain

import pytest
import torch

from deepstack_pl.batch import MultimodalBatch, PadSide, Record, Sample, collate
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.stream import PreparedSource, StepSampler, order, start_worker, train_loader


class Numbers:
    """Records that are their own number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int, /) -> Record:
        return Record(key=str(index), turns=(), images=())


def prepare(record: Record) -> Sample:
    if record.key == "bad":
        raise ValueError("bad: cannot be read.")
    none = torch.empty(0, dtype=torch.long)
    return Sample(
        key=record.key,
        input_ids=torch.tensor([int(record.key)]),
        labels=torch.tensor([0]),
        views=torch.empty(0, 3, 8, 8),
        images=0,
        token_index=torch.tensor([-1]),
        sequence_rows=none,
        group_rows=none[None, :][:0],
        vit_rows=none[None, :][:0],
    )


def prepare_and_say_where(record: Record) -> Sample:
    """A sample whose key tells of the process that made it."""
    sample = prepare(record)
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    sample.key = f"{os.getpid()} {torch.get_num_threads()} {ignores}"
    return sample


def together(samples: list[Sample]) -> MultimodalBatch:
    return collate(samples, pad_id=0, side=PadSide.right, tokens_per_view=4)


def batches(workers: int, start_step: int = 0, steps: int = 6, seed: int = 3) -> list[list[int]]:
    config = DataConfig(batch_size=4, workers=workers)
    loader = train_loader(Numbers(), prepare, together, config, seed, start_step, steps)
    assert len(loader) == steps - start_step
    return [batch.input_ids.flatten().tolist() for batch in loader]


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    assert sorted(order(100, 0, 0)) == list(range(100))
    orders = {tuple(order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(100, 1, 2).tolist() == order(100, 1, 2).tolist()


def test_order_is_what_it_was_when_published_runs_were_made() -> None:
    assert order(10, 0, 0).tolist() == [4, 5, 2, 3, 9, 0, 6, 1, 8, 7]


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 4), (7, 7)])
def test_every_epoch_has_every_sample_once_across_batches(n: int, batch_size: int) -> None:
    steps = 5 * n
    stream = list(chain.from_iterable(StepSampler(n, batch_size, 0, 0, steps)))
    assert len(stream) == steps * batch_size
    for start in range(0, len(stream), n):
        assert max(Counter(stream[start : start + n]).values()) == 1
    assert all(len(batch) == batch_size for batch in StepSampler(n, batch_size, 0, 0, steps))


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_going_on_at_a_step_gives_the_batches_that_would_have_come(start: int) -> None:
    whole = list(StepSampler(10, 4, 5, 0, 10))
    rest = StepSampler(10, 4, 5, start, 10)
    assert list(rest) == whole[start:]
    assert len(rest) == 10 - start


def test_workers_do_not_change_what_is_read() -> None:
    alone = batches(workers=0)
    assert alone == list(StepSampler(10, 4, 3, 0, 6))
    assert batches(workers=1) == alone
    assert batches(workers=2) == alone
    assert batches(workers=2, start_step=2) == alone[2:]
    assert batches(workers=0, seed=4) != alone


def test_the_loader_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(workers=1, steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_workers_ignore_interrupts_and_take_one_thread() -> None:
    config = DataConfig(batch_size=4, workers=1)
    for batch in train_loader(Numbers(), prepare_and_say_where, together, config, 0, 0, 2):
        for key in batch.keys:
            process, threads, ignores = key.split()
            assert int(process) != os.getpid()
            assert (threads, ignores) == ("1", "True")


def test_an_error_in_a_worker_names_the_record() -> None:
    class Bad(Numbers):
        def __getitem__(self, index: int, /) -> Record:
            return Record(key="bad", turns=(), images=())

    loader = train_loader(Bad(), prepare, together, DataConfig(batch_size=4, workers=1), 0, 0, 2)
    with pytest.raises(ValueError, match=r"bad: cannot be read\."):
        next(iter(loader))


def test_what_workers_are_given_can_be_pickled() -> None:
    source = pickle.loads(pickle.dumps(PreparedSource(Numbers(), prepare)))
    assert (len(source), source[7].input_ids.item()) == (10, 7)
    assert pickle.loads(pickle.dumps(start_worker)) is start_worker


@pytest.mark.parametrize(("n", "batch_size", "start"), [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_nothing_to_read_is_refused(n: int, batch_size: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1|count from 0"):
        StepSampler(n, batch_size, 0, start, 10)
