"""What test_store_several runs in each of two processes: saves that go well and saves to which something happens.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python stored_states.py FOLDER PHASE
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from deepstack_pl import processes
from deepstack_pl.training import checkpoints, store
from deepstack_pl.training.checkpoints import all_of, verify
from deepstack_pl.training.restore import read_mine, read_tensors
from deepstack_pl.training.store import SaveFailed, Saver, Store, flat

FACTS = {"config": "a digest"}


def state(value: float) -> dict[str, Any]:
    """Weights of uneven shares, of copies, and AdamW's states of one, on every process of as many as there are."""
    whole = whole_state(value)
    if processes.several():
        mesh = init_device_mesh("cpu", (processes.world(),))
        for part in (whole["model"], whole["optimizer"]["weight"]):
            for name in ("weight", "exp_avg"):
                if name in part:
                    part[name] = distribute_tensor(part[name], mesh, [Shard(0)])
        whole["model"]["copied"] = distribute_tensor(whole["model"]["copied"], mesh, [Replicate()])
    return whole


def whole_state(value: float) -> dict[str, Any]:
    weight = torch.arange(10.0).reshape(5, 2) + value
    weights = {"weight": weight, "single": weight[:1].clone(), "copied": weight + 1, "plain": torch.full((3,), value)}
    moments = {"step": torch.tensor(value), "exp_avg": weight * 2}
    return {"model": weights, "optimizer": {"weight": moments}}


def equal(tensors: dict[str, Any], value: float) -> bool:
    """Whether ``tensors`` are `state(value)`."""
    expected = dict(flat(state(value)))
    return all(torch.equal(processes.local(t), processes.local(expected[name])) for name, t in flat(tensors))


def save(saver: Saver, step: int, tensors: dict[str, Any] | None = None, mine: Any = None) -> str:
    """What came of it."""
    own = processes.rank() if mine is None else mine
    try:
        saver.start(step, tensors or state(step), {"global_step": step}, {"rank": own}, FACTS)
        saver.wait()
    except SaveFailed as error:
        return str(error)
    return "saved"


class Broken(store.FileSystemWriter):
    """Of which process 1's disk is."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if processes.rank() == 1:
            raise OSError("no disk")
        return super().write_data(plan, planner)


class Killed(store.FileSystemWriter):
    """Process 1 dies in the middle of a file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        found = super().write_data(plan, planner)
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def faults(folder: Path, saver: Saver) -> dict[str, Any]:
    """Saves that fail on process 1 alone, between one that goes well before and one after."""
    first, real = processes.rank() == 0, store.FileSystemWriter
    told: dict[str, Any] = {"before": save(saver, 1)}
    store.FileSystemWriter = Broken  # type: ignore[misc]
    told["writer"] = save(saver, 2)
    store.FileSystemWriter = real  # type: ignore[misc]
    told["own"] = save(saver, 2, mine=0 if first else Path())
    poisoned = state(2)
    if not first:
        processes.local(poisoned["model"]["weight"])[0, 0] = float("nan")
    told["nan"] = save(saver, 2, poisoned)
    if not first:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    told["full"] = save(saver, 2)
    if not first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    processes.from_all(None)  # process 0 cleans up
    told["left"] = sorted(path.name for path in folder.iterdir())
    processes.from_all(None)
    told["after"] = save(saver, 3)
    return told


def healthy(folder: Path, saver: Saver) -> dict[str, Any]:
    """What one process saved, read by two; what two save, while what was saved changes under them; one is slow."""
    one = all_of(folder / "one")[0]
    found = state(0.0)
    read_tensors(one, found)
    told: dict[str, Any] = {"from one": equal(found, 5.0), "mine of one": read_mine(one, processes.rank())}
    tensors = state(8.0)
    real = checkpoints.sha256
    if processes.rank() == 1:
        checkpoints.sha256 = lambda file: (time.sleep(0.5), real(file))[1]
    saver.start(8, tensors, {}, {"rank": processes.rank()}, FACTS)
    for _, tensor in flat(tensors):
        processes.local(tensor).fill_(-1)
    saver.wait()
    (two,) = all_of(folder / "two")
    read_tensors(two, tensors)
    told |= {"from two": equal(tensors, 8.0), "files": sorted(two.manifest["files"]), "world": two.manifest["world"]}
    told |= {"mine": read_mine(two, processes.rank()), "share": verify(two, share=(processes.rank(), 2))}
    return told


def main(folder: Path, phase: str) -> None:
    processes.join(30, torch.device("cpu"))
    saver = Saver(Store(folder / ("two" if phase == "healthy" else phase)))
    told: dict[str, Any] = {}
    if phase == "healthy":
        told = healthy(folder, saver)
    elif phase == "faults":
        told = faults(folder / phase, saver)
    elif phase == "killed":
        save(saver, 1)
        store.FileSystemWriter = Killed  # type: ignore[misc]
        try:
            save(saver, 2)
        except RuntimeError as error:
            told = {"error": type(error).__name__, "left": sorted(path.name for path in (folder / phase).iterdir())}
    saver.close()
    (folder / f"{phase}-{processes.rank()}.json").write_text(json.dumps(told))
    if processes.several():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
