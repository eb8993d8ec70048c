"""The processes of one run, and what they say to each other. One process alone is a group of one.

Every function that names all processes must be called by all of them: whoever did not come would be waited for.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _joined() else 1


def several() -> bool:
    """Whether other processes take part."""
    return world() > 1


def join(timeout: float, device: torch.device) -> None:
    """Meet the processes that the launcher's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    ``timeout``: seconds that one waits for another, until `wait_for`. Words go over gloo, tensors of a GPU over NCCL.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def wait_for(timeout: float) -> None:
    """From now on one waits for another for ``timeout`` seconds. All processes must call it."""
    if not several():
        return
    from_all(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the public name is newer than the oldest torch that will do
        _set_pg_timeout(timedelta(seconds=timeout))


def from_first(value: T) -> T:
    """What process 0 has; plain values, pickled."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def from_all(value: T) -> list[T]:
    """What each process has, in the order of their numbers; plain values, pickled."""
    if not several():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def most(*values: int) -> list[int]:
    """The largest of each over all processes, by way of the CPU: nothing waits for a GPU."""
    if not several():
        return list(values)
    both = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return both.tolist()


def local(tensor: Tensor) -> Tensor:
    """The share of a sharded tensor that lies here; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, any other itself. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process of each machine alone, then its others: what it fetches and writes, they find. All processes
    must enter.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        from_all(None)
    yield
    if first:
        from_all(None)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded ``model`` here, for as long as it lasts: then it runs as any other model, and processes
    may run it each in its own way. Entering and leaving takes all processes; what a pass changes is lost.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        if module is not model:  # which keeps its own for the whole step anyway
            module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            if module is not model:
                module.set_reshard_after_forward(True, recurse=False)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
