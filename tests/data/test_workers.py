"""The processes that read: what they make of samples, and what is said when one of them is lost."""

import gc
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, count
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from numbered import Numbers, blank, prepare, together

from deepstack_pl.batch import MultimodalBatch, Reason, Record, Refused, Sample
from deepstack_pl.data.batching import FILL
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.stream import MicroBatchSampler, Stream, train_loader
from deepstack_pl.data.workers import PreparedSource, WatchedLoader, start_worker


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that torch waits for a worker that does not end."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


def loader_of(
    source: Numbers,
    make: Callable[[Record], Sample] = prepare,
    *,
    workers: int = 1,
    start: int = 0,
    steps: int = 3,
    seed: int = 3,
    rank: int = 0,
    world: int = 1,
    size: int | None = None,
    batching: Batching = Batching.samples,
    timeout: float = 60,
) -> WatchedLoader:
    config = DataConfig(name="numbers", batch_size=4, workers=workers, batching=batching)
    stream = Stream(source, config, seed, lengths=source.columns.text, capacity=3)
    sampler = MicroBatchSampler(stream, stream.position(start), steps=steps - start, rank=rank, world=world, size=size)
    loader = train_loader(source, make, blank, together, sampler, config, seed, timeout)
    assert len(loader) == len(sampler)
    return loader


def rows(loader: WatchedLoader) -> list[list[int]]:
    return [batch.input_ids.flatten().tolist() for batch in loader]


def test_workers_do_not_change_what_is_read() -> None:
    source = Numbers(10)
    alone = rows(loader_of(source, workers=0, steps=6))
    assert sorted(chain(*alone[:3])) == [-1, -1, *range(10)]
    for workers in (1, 2):
        assert rows(loader_of(source, workers=workers, steps=6)) == alone
    assert rows(loader_of(source, workers=2, start=2, steps=6)) == alone[2:]
    assert rows(loader_of(source, workers=0, steps=6, seed=4)) != alone
    shared = [rows(loader_of(source, steps=6, rank=rank, world=2, size=1)) for rank in (0, 1)]
    assert [row for pair in zip(*shared, strict=True) for row in chain(*pair)] == list(chain(*alone))


def test_the_loader_leaves_the_global_random_stream_alone() -> None:
    before = torch.get_rng_state()
    rows(loader_of(Numbers(10)))
    assert torch.equal(torch.get_rng_state(), before)


def prepare_and_say_where(record: Record) -> Sample:
    """A sample whose key tells of the process that made it."""
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return replace(prepare(record), key=f"{os.getpid()} {torch.get_num_threads()} {ignores}")


def test_workers_ignore_interrupts_and_take_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        for batch in loader_of(Numbers(12), prepare_and_say_where):
            for key in batch.keys:
                process, threads, ignores = key.split()
                assert int(process) != os.getpid()
                assert (threads, ignores) == ("1", "True")
    finally:
        torch.set_num_threads(1)


def test_whatever_process_is_started_so_takes_one_thread() -> None:
    """DataLoader's workers do already; those that measure lengths would not."""
    handler = signal.getsignal(signal.SIGINT)
    torch.set_num_threads(2)
    try:
        start_worker()
        assert torch.get_num_threads() == 1
    finally:
        signal.signal(signal.SIGINT, handler)
        torch.set_num_threads(1)


def refuse_threes(record: Record) -> Sample:
    if record.key == "3":
        raise Refused(Reason.too_long, "3: it is too long.")
    return prepare(record)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_refused_sample_becomes_a_row_that_says_why_and_the_batch_stays_as_large(workers: int) -> None:
    """Whether the source or the processor refuses it."""
    found = {}
    for batch in loader_of(Numbers(10, bad=(2, 7), name=""), refuse_threes, workers=workers):
        assert len(batch.keys) == 4
        found |= dict(zip(batch.keys, batch.refused, strict=True))
    assert set(found) == {"", *map(str, range(10))}
    assert {key: why for key, why in found.items() if why} == {
        "2": (Reason.image, "2: no picture."),
        "3": (Reason.too_long, "3: it is too long."),
        "7": (Reason.image, "7: no picture."),
    }


def test_a_refused_sample_is_counted_with_its_source() -> None:
    source = Numbers(3, bad=(1,), name="coco")
    source.columns = replace(source.columns, sources=("coco",))
    sample = PreparedSource(source, prepare, blank)[1]
    assert isinstance(sample, Sample)
    assert (sample.key, sample.source) == ("coco1", "coco")


def test_a_row_that_fills_reads_nothing_and_counts_nothing() -> None:
    sample = PreparedSource(Broken(1), prepare, blank)[FILL]
    assert isinstance(sample, Sample)
    assert (sample.key, sample.source, sample.refused) == ("", "", None)


def test_the_rows_of_a_packed_batch_are_the_units_of_the_plan() -> None:
    loader = loader_of(Numbers(10), batching=Batching.packed)
    batches = list(loader)
    assert [row.max().item() for row in batches[0].segment_ids] == [3, 3, 3, 1]
    assert sorted(batches[0].keys, key=int) == list(map(str, range(10)))
    assert [len(batch.input_ids) for batch in batches] == [4, 4, 4]
    assert all(batch.input_ids.shape == (4, 3) for batch in batches)


class Broken(Numbers):
    def __getitem__(self, index: int, /) -> Record:
        raise OSError(f"{self.key(index)}: the disk is gone.")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_refusal_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(OSError, match=r"\d: the disk is gone\."):
        next(iter(loader_of(Broken(8), workers=workers)))


def raise_as_a_loader_would(record: Record) -> Sample:
    raise RuntimeError(f"DataLoader of {record.key} is broken.")


def test_an_error_of_the_reader_is_not_taken_for_a_lost_worker() -> None:
    for workers in (0, 1):
        with pytest.raises(RuntimeError) as raised:
            rows(loader_of(Numbers(8), raise_as_a_loader_would, workers=workers))
        assert "waited for" not in str(raised.value)
        del raised
        gc.collect()  # torch waits for such a worker in vain; here, and not within another test


def kill_itself_at_five(record: Record) -> Sample:
    if record.key == "5":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(record)


def sigterm_with_the_second_and_the_last(record: Record) -> Sample:
    """As a batch system, and then somebody who means it. The queue has time to hand on what is done."""
    made = next(MADE)
    if made in (1, 10):
        time.sleep(1.0 if made == 10 else 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    return prepare(record)


MADE = count()


def wait_at_five(record: Record) -> Sample:
    if record.key == "5":
        time.sleep(60)
    return prepare(record)


def hand_nothing_over_at_five(record: Record) -> Sample:
    """As torch does where /dev/shm is full."""

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    if record.key == "5":
        ForkingPickler.register(torch.Tensor, refuse)
    return prepare(record)


def read_until_lost(batches: Iterator[MultimodalBatch]) -> tuple[list[list[str]], str]:
    """The keys that came, and the error that came instead of the next."""
    came: list[list[str]] = []
    with pytest.raises(RuntimeError) as raised:  # noqa: PT012
        for batch in batches:
            came.append(batch.keys)
    said = str(raised.value)
    del raised
    gc.collect()  # ends the other workers now
    return came, said


def test_a_worker_that_is_killed_is_an_error_that_names_it_and_what_was_waited_for() -> None:
    alone = [batch.keys for batch in loader_of(Numbers(12), workers=0)]
    came, said = read_until_lost(iter(loader_of(Numbers(12), kill_itself_at_five)))
    assert came == alone[: len(came)], "what did come is what should have come"
    assert "DataLoader worker (pid" in said
    assert f"worker 0's, with {', '.join(alone[len(came)][:3])}, ..." in said
    assert "lower data.workers" in said


def test_a_worker_that_is_killed_is_noticed_within_seconds_though_its_signal_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", True)
    monkeypatch.setattr("deepstack_pl.data.workers._LOOK", 0.5)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        _, said = read_until_lost(iter(loader_of(Numbers(12), kill_itself_at_five, timeout=200)))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "exited unexpectedly. What was waited for is worker 0's" in said


def test_a_worker_brings_its_batches_after_a_sigterm_and_ends_at_the_second() -> None:
    alone = [batch.keys for batch in loader_of(Numbers(12), workers=0)]
    came, said = read_until_lost(iter(loader_of(Numbers(12), sigterm_with_the_second_and_the_last)))
    assert came == alone[:2], "the first came with the first batch"
    assert "worker 0's, with" in said


def test_a_worker_that_dies_during_a_step_disturbs_no_step_and_is_told_where_its_batch_is_waited_for() -> None:
    alone = [batch.keys for batch in loader_of(Numbers(12), workers=0)]

    def die_in_the_last_batch(record: Record) -> Sample:
        if record.key == alone[2][0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(record)

    others = multiprocessing.active_children()
    batches = iter(loader_of(Numbers(12), die_in_the_last_batch))
    assert next(batches).keys == alone[0]
    (worker,) = set(multiprocessing.active_children()) - set(others)
    assert worker.pid is not None
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the step: a signal has come, and nothing was raised
    came, said = read_until_lost(batches)
    assert came == alone[1 : 1 + len(came)]
    assert f"exited unexpectedly. What was waited for is worker 0's, with {', '.join(alone[1 + len(came)][:3])}" in said


def test_a_worker_that_cannot_hand_a_batch_over_is_an_error_at_once_and_names_the_shared_memory() -> None:
    came, said = read_until_lost(iter(loader_of(Numbers(12), hand_nothing_over_at_five, timeout=200)))
    assert len(came) < 3
    assert "Shared memory (/dev/shm) is full" in said
    assert "lower data.workers" in said


def test_a_worker_that_hangs_is_an_error_after_the_timeout_that_names_it_and_what_was_waited_for() -> None:
    alone = [batch.keys for batch in loader_of(Numbers(12), workers=0)]
    place = next(place for place, keys in enumerate(alone) if "5" in keys)
    begin = time.monotonic()
    came, said = read_until_lost(iter(loader_of(Numbers(12), wait_at_five, workers=2, timeout=2)))
    assert came == alone[:place]
    assert "timed out after 2 seconds" in said
    assert f"worker {place % 2}'s, with {', '.join(alone[place][:3])}, ..." in said
    assert time.monotonic() - begin < 30


def test_what_workers_are_given_can_be_pickled() -> None:
    source = pickle.loads(pickle.dumps(PreparedSource(Numbers(10), prepare, blank)))
    assert (len(source), source[7].input_ids.item()) == (10, 7)
    assert pickle.loads(pickle.dumps(start_worker)) is start_worker
