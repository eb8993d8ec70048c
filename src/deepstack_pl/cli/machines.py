"""Over how many processes a run is spread, and whether they are there already."""

import os
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from deepstack_pl.config.run import RunConfig
from deepstack_pl.training.config import Spread


@dataclass(frozen=True, slots=True)
class Machines:
    """Over what a run is spread: one process for each device."""

    devices: int
    nodes: int

    @property
    def world(self) -> int:
        return self.devices * self.nodes


def wanted(run: RunConfig) -> Machines:
    """What ``run`` asks for.

    Raises:
        ValueError: the strategy is for another number of processes, or no such number can be.
    """
    nodes = _nodes(run)
    devices = _devices(run)
    if run.strategy.kind is Spread.single and devices * nodes > 1:
        raise ValueError(
            f"strategy={run.strategy.name} is one process, but trainer.devices={run.trainer.get('devices')} and "
            f"trainer.num_nodes={nodes} make {devices * nodes}. Say strategy=fsdp or strategy=ddp, or one device."
        )
    return Machines(devices, nodes)


def started() -> bool:
    """Whether this process is one of a group already; torchrun's variables are filled in where srun started it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:  # also of a batch script, which has no srun around it
        return False
    slurm = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    processes = int(slurm["STEP_NUM_TASKS"])
    values = {
        "RANK": slurm["PROCID"],
        "LOCAL_RANK": slurm["LOCALID"],
        "GROUP_RANK": slurm["NODEID"],
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes // int(slurm.get("STEP_NUM_NODES", "1")),
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(slurm.get("STEP_NODELIST") or slurm["NODELIST"]),
        "MASTER_PORT": 15000 + int(slurm["JOB_ID"]) % 10000,  # the same for all of the job, and few jobs' own
    }
    os.environ |= {name: str(value) for name, value in values.items()}
    return True


def require_group(there: Machines) -> None:
    """What started this group, and what the run asks for, are the same.

    Raises:
        ValueError: with both numbers.
    """
    processes = int(os.environ["WORLD_SIZE"])
    if processes != there.world:
        raise ValueError(
            f"{processes} processes were started, but trainer.devices={there.devices} and trainer.num_nodes="
            f"{there.nodes} are {there.world}. Start as many as these say."
        )


def require_device(run: RunConfig) -> None:
    """The GPU that this process of a group takes, the one of its number on its machine, is there.

    Raises:
        ValueError: it sees too few.
    """
    place, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not on_gpu(run) or place < here:
        return
    remedy = "Start no more processes on a machine than it has GPUs, and say trainer.devices as many."
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        remedy += " srun must let each see all of its machine's: --gpus-per-node, not --gpus-per-task or --gpu-bind."
    raise ValueError(
        f"process {os.environ['RANK']} is number {place} on its machine, counted from 0, and takes the GPU of that "
        f"number, but it sees {here}. {remedy}"
    )


def _nodes(run: RunConfig) -> int:
    asked = run.trainer.get("num_nodes")
    if asked is None:
        return 1
    if not str(asked).isdigit() or int(asked) < 1:
        raise ValueError(f"trainer.num_nodes={asked}: machines, 1 or more.")
    return int(asked)


def _devices(run: RunConfig) -> int:
    """Processes on each machine."""
    asked, here = run.trainer.get("devices"), torch.cuda.device_count() if on_gpu(run) else 0
    if asked is None and run.strategy.kind is Spread.single:
        return 1
    if asked in (None, "auto", "-1", -1):
        if not here:
            raise ValueError(
                f"strategy={run.strategy.name} takes a process for each device, and there is no GPU here to count. Say "
                "trainer.devices=N."
            )
        return here
    if isinstance(asked, list | tuple) and len(asked) == 1:
        return 1
    if isinstance(asked, list | tuple):
        chosen = ",".join(map(str, asked))
        raise ValueError(
            f"trainer.devices={asked}: processes take the GPUs there are in their order. Choose by the environment, "
            f"CUDA_VISIBLE_DEVICES={chosen}, and say trainer.devices={len(asked)}."
        )
    if not str(asked).isdigit() or int(asked) < 1:
        raise ValueError(f"trainer.devices={asked}: use 1 or more, or auto for every GPU here.")
    return int(asked)


def on_gpu(run: RunConfig) -> bool:
    accelerator = str(run.trainer.get("accelerator", "auto"))
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
