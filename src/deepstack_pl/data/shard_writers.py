"""Shards of a corpus written by several processes at once."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from deepstack_pl.data.progress import bar
from deepstack_pl.data.shard_jobs import Job, Stopped, Written, write_shard


def write_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Written]]:
    """Each job as it is done."""
    if not jobs:
        return
    with bar(f"Writing {len(jobs)} shards", sum(len(job.records) for job in jobs)) as advance:
        if processes == 1 or len(jobs) == 1:
            for job in jobs:
                yield job, write_shard(job, advance)
        else:
            yield from _write_at_once(jobs, min(processes, len(jobs)), advance)


def _write_at_once(
    jobs: Sequence[Job], processes: int, advance: Callable[[int], None]
) -> Iterator[tuple[Job, Written]]:
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(count, stop))
    pending: dict[Future[Written], Job] = {}
    try:
        pending = {pool.submit(_in_process, job): job for job in jobs}
        told = 0
        while pending:
            ready, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = count.value
            advance(now - told)
            told = now
            for future in ready:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "A process that wrote shards was ended from outside (out of memory?). What is finished is kept: build "
            "again, perhaps with fewer processes=."
        ) from error
    finally:
        stop.set()  # Ctrl-C, or an error: the others stop at their next record and leave nothing half written
        pool.shutdown(wait=True, cancel_futures=True)


def _start(count: Any, stop: Any) -> None:
    """Ctrl-C is the main process's to answer, and nobody outlives it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared.update(count=count, stop=stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


_shared: dict[str, Any] = {}  # of a writing process


def _in_process(job: Job) -> Written:
    def advance(done: int) -> None:
        if _shared["stop"].is_set():
            raise Stopped
        with _shared["count"].get_lock():
            _shared["count"].value += done

    return write_shard(job, advance)
