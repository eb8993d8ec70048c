"""Checkpoints as transactions: what is saved is whole, on the disk and agreed by all processes, or it is not there.

A temporary folder is filled, synced and sealed with a manifest; a rename is the commit; then ``latest`` and pruning.
Tensors go through torch.distributed.checkpoint, so that any number of processes may read them: restore.py.
"""

import io
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from deepstack_pl.processes import local, rank, several, world
from deepstack_pl.training import checkpoints
from deepstack_pl.training.checkpoints import MANIFEST, METADATA, MINE, PLAIN, VERSION, write_through

T = TypeVar("T")
_PATIENCE = timedelta(hours=1)  # that one process waits for another's disk


class SaveFailed(RuntimeError):
    """A checkpoint was not written, on no process; earlier ones are as they were."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """What is to be written, as it was when it was handed in; ``problem``: why this process cannot."""

    step: int
    tensors: dict[str, Any]
    plain: bytes
    mine: bytes
    facts: Mapping[str, Any]
    problem: Exception | None = None


class Store:
    """The checkpoints of a run in ``folder``, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        checkpoints.require_keep(keep)
        self.folder = folder
        self.keep = keep

    def write(
        self,
        step: int,
        tensors: dict[str, Any],
        plain: Any,
        mine: Any,
        facts: Mapping[str, Any],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Save a checkpoint; all processes must, over ``group``. One that is there already, whole and with the same
        ``facts``, stays.

        Args:
            tensors: nested dicts by name; whole, or each process's share of them.
            plain: what is the same everywhere; process 0's is saved. Plain values and tensors, as of ``mine``.
            mine: this process's own.
            facts: what the run says of itself; JSON.

        Raises:
            SaveFailed: it could not be written, or holds a number that is not finite.
        """
        self._write(_draft(step, lambda: tensors, plain, mine, facts), group)

    def _write(self, draft: _Draft, group: dist.ProcessGroup | None) -> None:
        agreed = partial(_agreed, draft.step, group)
        agreed(partial(_look_over, draft))
        folder = agreed(partial(self._prepare, draft))[0]
        if folder is None:
            return  # it is there
        try:
            agreed(partial(_write_own, draft, folder))
            agreed(partial(_write_tensors, draft, folder, group))
            files = agreed(partial(_files, folder))
            agreed(partial(self._commit, draft, folder, files))
        finally:
            if rank() == 0 and folder.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what stays is the next sweep's

    def _prepare(self, draft: _Draft) -> Path | None:
        """On process 0, an empty folder to write to; None if there is nothing to do."""
        if rank():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep(self.folder)
        if self._has(draft):
            return None
        need = sum(tensor.numel() * tensor.element_size() for _, tensor in flat(draft.tensors))
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * need:
            raise OSError(
                f"{self.folder} has {free / 1e9:.2f} GB free, and a checkpoint of {need / 1e9:.2f} GB asks for a fifth "
                "more than that. Make room"
            )
        folder = checkpoints.aside(self.folder, checkpoints.name_of(draft.step))
        folder.mkdir()
        return folder

    def _has(self, draft: _Draft) -> bool:
        same = [there for there in checkpoints.all_of(self.folder) if there.step == draft.step]
        return any(
            there.manifest["facts"] == draft.facts and not checkpoints.verify(there, deep=False) for there in same
        )

    def _commit(self, draft: _Draft, folder: Path, files: list[dict[str, Any]]) -> None:
        if rank():
            return
        manifest = {
            "version": VERSION,
            "step": draft.step,
            "world": world(),
            "facts": draft.facts,
            "files": {name: file for each in files for name, file in each.items()},
        }
        write_through(folder / MANIFEST, checkpoints.seal(manifest))
        checkpoints.sync(folder)
        place = self.folder / checkpoints.name_of(draft.step)
        if place.exists():  # damaged, or of a run that was another
            checkpoints.discard(place)
        os.replace(folder, place)
        try:
            checkpoints.sync(self.folder)
            checkpoints.remember(self.folder, place.name)
            checkpoints.prune(self.folder, self.keep)
        except OSError as error:
            warnings.warn(f"{place} is saved, but what came after failed: {error}.", stacklevel=2)


class Saver:
    """Saves to ``store``: at once, or in a thread while training goes on, one at a time.

    All processes must make it, and call it in the same order.
    """

    def __init__(self, store: Store, asynchronous: bool = True) -> None:
        self._store = store
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if several() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._pending: Future[None] | None = None

    def start(self, step: int, tensors: dict[str, Any], plain: Any, mine: Any, facts: Mapping[str, Any]) -> None:
        """Save what `Store.write` takes, as it is now; waits for the save before.

        Raises:
            SaveFailed: the save before failed, and this one is not begun; or this one, where it is written at once.
        """
        self.wait()
        if self._thread is None:
            self._store.write(step, tensors, plain, mine, facts, self._group)
            return
        staged: Any = partial(self._stager.stage, tensors)  # no Future, for it is not asynchronous
        draft = _draft(step, staged, plain, mine, facts)
        self._pending = self._thread.submit(self._store._write, draft, self._group)

    def wait(self, timeout: float | None = None) -> bool:
        """Until what was started is saved, for ``timeout`` seconds at most; whether something was.

        Raises:
            SaveFailed: it is not.
            TimeoutError: not yet.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result(timeout)
        return pending is not None

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._stager.close()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None


def flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts and their dotted names."""
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            assert isinstance(value, Tensor), f"{prefix}{name} is a {type(value).__name__}: it would be pickled"
            yield f"{prefix}{name}", value


def _draft(step: int, tensors: Callable[[], dict[str, Any]], plain: Any, mine: Any, facts: Mapping[str, Any]) -> _Draft:
    """What goes wrong here is said where all processes can hear it."""
    try:
        return _Draft(step, tensors(), _packed(plain), _packed(mine), json.loads(json.dumps(facts)))
    except Exception as error:
        return _Draft(step, {}, b"", b"", {}, error)


def _packed(value: Any) -> bytes:
    """As torch saves it; it must come back without pickles."""
    stream = io.BytesIO()
    torch.save(value, stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    return stream.getvalue()


def _look_over(draft: _Draft) -> None:
    if draft.problem:
        raise draft.problem
    for name, tensor in flat(draft.tensors):
        values = local(tensor)
        if values.is_floating_point() and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")


def _write_own(draft: _Draft, folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            f"{socket.gethostname()} does not see {folder}, which process 0 has made: checkpoints lie on a file system "
            "that all machines share"
        )
    write_through(folder / MINE.format(rank()), draft.mine)
    if rank() == 0:
        write_through(folder / PLAIN, draft.plain)


def _write_tensors(draft: _Draft, folder: Path, group: dist.ProcessGroup | None) -> None:
    writer = FileSystemWriter(folder, sync_files=True)
    dcp.save(draft.tensors, storage_writer=writer, process_group=group, no_dist=not several())


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Those that this process wrote, with their sizes and digests."""
    written = [*folder.glob(f"__{rank()}_*.distcp"), folder / MINE.format(rank())]
    if rank() == 0:
        written += [folder / METADATA, folder / PLAIN]
    return {file.name: {"bytes": file.stat().st_size, "sha256": checkpoints.sha256(file)} for file in written}


def _agreed(step: int, group: dist.ProcessGroup | None, phase: Callable[[], T]) -> list[T]:
    """What ``phase`` came to on each process.

    Raises:
        SaveFailed: on all, if it failed on one. (A process that is gone is another error: a broken connection.)
    """
    value: T | None = None
    problem: tuple[int, str] | None = None
    try:
        value = phase()
    except CheckpointException as error:  # a BaseException, which all have
        number, (first, _) = min(error.failures.items())
        problem = number, _said(first)
    except Exception as error:
        problem = rank(), _said(error)
    found: list[Any] = [(value, problem)]
    if several():
        found = [None] * world()
        dist.all_gather_object(found, (value, problem), group=group)
    for _, failed in found:
        if failed is not None:
            who = f"Process {failed[0]}: " if several() else ""
            raise SaveFailed(
                f"The checkpoint of step {step} was not written. {who}{failed[1]}. Earlier ones are as they were."
            )
    return [each for each, _ in found]


def _said(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" :.")
