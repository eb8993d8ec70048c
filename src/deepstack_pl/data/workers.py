"""The processes that read samples: what they do, and what is said when one is lost."""

import errno
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from deepstack_pl.batch import Reason, Record, Refused, Sample
from deepstack_pl.data.batching import FILL, Unit
from deepstack_pl.data.records import Source

Blank = Callable[[str, str, tuple[Reason, str] | None], Sample]

TIMEOUT = 600  # seconds that a batch may take before a worker is taken for hung
_LOOK = 1.0  # seconds between looks at whether the workers live
_FULL = os.strerror(errno.ENOSPC)
_NAMED = 3  # samples of a batch that did not come


def start_worker(_worker: int = 0) -> None:
    """Signals are the main process's to answer, and workers take one core each."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_it)
    torch.set_num_threads(1)
    # A batch that cannot be handed over would be printed and forgotten, and waited for until the timeout.
    Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)  # type: ignore[method-assign]


def _cannot_hand_over(error: BaseException, batch: Any) -> None:
    print(f"data worker {os.getpid()}: a batch cannot be handed over: {error}", file=sys.stderr, flush=True)
    os._exit(errno.ENOSPC if _FULL in str(error) else 1)


def _leave_it(number: int, frame: FrameType | None) -> None:
    """A batch system sends its SIGTERM to every process of a job: the main one still takes batches until its step is
    done. The second is meant.
    """
    signal.signal(number, signal.SIG_DFL)


class PreparedSource(Dataset[Sample | list[Sample]]):
    """A source's records as samples, made where they are read: in the worker.

    A worker never drops: in place of a sample that is refused stands a blank row that says why.
    """

    def __init__(self, source: Source, prepare: Callable[[Record], Sample], blank: Blank) -> None:
        self.source, self.prepare, self.blank = source, prepare, blank
        self.columns = source.columns  # once: it may be made anew whenever it is asked for

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, unit: int | Unit) -> Sample | list[Sample]:
        """The sample of a number, or those of a packed row."""
        return [self._sample(number) for number in unit] if isinstance(unit, tuple) else self._sample(unit)

    def names(self, units: Sequence[int | Unit]) -> list[str]:
        """The samples' names in messages, those that only fill a batch left out."""
        rows = [unit if isinstance(unit, tuple) else (unit,) for unit in units]
        return [self.source.key(number) for row in rows for number in row if number != FILL]

    def _sample(self, number: int) -> Sample:
        if number == FILL:
            return self.blank("", "", None)
        try:
            return self.prepare(self.source[number])
        except Refused as refused:
            source = self.columns.sources[self.columns.source[number]]
            return self.blank(self.source.key(number), source, (refused.reason, refused.sentence))


class _Looking(_MultiProcessingDataLoaderIter):
    """Looks after its workers while it waits for a batch, and then alone.

    torch tells of a worker's end by a signal, whose answer is an error at whatever the process is doing: in the middle
    of an optimiser's step, or within a destructor that swallows it. Where a timeout is given, it looks by itself only
    when that is over.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        torch._C._remove_worker_pids(id(self))
        self._worker_pids_set = False

    def _try_get_data(self, timeout: float = _LOOK) -> Any:
        torch._C._set_worker_pids(id(self), tuple(worker.pid for worker in self._workers))
        try:
            end = time.monotonic() + timeout
            while True:
                left = max(end - time.monotonic(), 0.0)
                found = super()._try_get_data(min(left, _LOOK))
                if found[0] or left <= _LOOK:
                    return found
        finally:
            torch._C._remove_worker_pids(id(self))


class WatchedLoader(DataLoader[Any]):
    """A loader that says which worker and which batch it waited for when none came.

    Its sampler keeps the batches that it handed out in ``handed``, its dataset names the samples of one.
    """

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _Looking(self) if self.num_workers else super()._get_iterator()

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Batches.

        Raises:
            RuntimeError: a worker was killed, or brought nothing within ``timeout`` seconds.
        """
        handed: deque[list[Any]] = self.batch_sampler.handed  # type: ignore[union-attr]
        batches, count = super().__iter__(), 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not self.num_workers or not str(error).startswith("DataLoader "):  # what a worker raised
                    raise
                assert isinstance(batches, _Looking)
                keys = self.dataset.names(handed[0])  # type: ignore[attr-defined]
                more = ", ..." if len(keys) > _NAMED else ""
                remedy = (
                    "Shared memory (/dev/shm) is full: batches on their way lie there. Give the container more "
                    "(docker run --shm-size=8g), or lower data.workers or data.micro_batch_size."
                    if any(worker.exitcode == errno.ENOSPC for worker in batches._workers)
                    else "If it was killed, the machine may be short of memory (see dmesg): lower data.workers. If it "
                    "hangs, look at the disk or network that these samples lie on."
                )
                raise RuntimeError(
                    f"{str(error).rstrip(' .')}. What was waited for is worker {count % self.num_workers}'s, with "
                    f"{', '.join(keys[:_NAMED])}{more}. {remedy}"
                ) from error
            handed.popleft()
            count += 1
            yield batch
