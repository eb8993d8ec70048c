"""Several processes for one run, started on this machine.

Each is a process of its own from the beginning, one group for each run, so that the points of a sweep never meet. Under
torchrun and srun they are there already, and nothing is started here.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from deepstack_pl.cli.folders import CONFIG, relative
from deepstack_pl.cli.machines import on_gpu, wanted
from deepstack_pl.cli.resume import Resumed
from deepstack_pl.cli.surroundings import cores
from deepstack_pl.config.load import save
from deepstack_pl.config.run import RunConfig
from deepstack_pl.training.config import PREEMPTED

CALL = "call.json"
CTRL_C = 130  # exit status of a process that it stopped at once
_GRACE = 20.0  # seconds in which the others end by themselves once one has failed
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# What a process says because another one is gone.
_CONSEQUENCES = (
    "onnection closed",
    "onnection reset",
    "onnection refused",
    "imed out",
    "roken pipe",
    "TCPStore",
    "DistStoreError",
)
_PR_SET_PDEATHSIG = 1


def launch(run: RunConfig, folder: Path, command: str, arm: Sequence[str], resumed: Resumed | None) -> bool:
    """Start one process for each device of this machine, and wait for all; whether Ctrl-C ended them.

    Process 0 has this one's terminal, the others write to ``folder/logs``. Signals are handed on to all.

    Raises:
        ValueError, RuntimeError: what the process said that failed first.
        SystemExit: they were preempted.
        KeyboardInterrupt: they were stopped at once.
    """
    there = wanted(run)
    if there.nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={there.nodes}: this starts processes on one machine. Start them on each by torchrun "
            f"--nnodes {there.nodes} --nproc-per-node {there.devices} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "train.py ..., or by srun."
        )
    if on_gpu(run) and there.devices > torch.cuda.device_count():
        raise ValueError(
            f"trainer.devices={there.devices}, but torch finds {torch.cuda.device_count()} GPUs here. Say as many, or "
            "trainer.accelerator=cpu."
        )
    with tempfile.TemporaryDirectory(prefix="deepstack-") as private, _Group(Path(private), folder) as group:
        save(run, group.private / CONFIG)
        call = {"folder": str(folder), "command": command, "arm": list(arm), "resumed": None}
        if resumed is not None:
            names = {"folder": str(resumed.folder), "checkpoint": str(resumed.checkpoint)}
            call["resumed"] = {**names, "results": resumed.results, "named": resumed.named, "notes": resumed.notes}
        (group.private / CALL).write_text(json.dumps(call), encoding="utf-8")
        group.start(there.devices)
        return group.wait()


class _Group:
    """The processes of one run on this machine; none outlives it."""

    def __init__(self, private: Path, folder: Path) -> None:
        self.private, self.folder = private, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._old: dict[signal.Signals, Any] = {}
        self._sent: int | None = None  # the first signal that was handed on
        self._given_up: set[int] = set()  # processes that had to be ended

    def __enter__(self) -> "_Group":
        for number in _FORWARDED:
            self._old[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def start(self, count: int) -> None:
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores() // count)),
        }
        words = [sys.executable, "-m", "deepstack_pl.cli.worker", str(self.private)]
        for rank in range(count):
            environment = {**os.environ, **{n: str(v) for n, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}}
            self.processes.append(
                subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=_die_with_the_parent)
            )

    def wait(self) -> bool:
        """All of them, however long it takes; where one fails, the others for a while."""
        failed_at = None
        while any(process.poll() is None for process in self.processes):
            if failed_at is None and any(_bad(process.poll()) for process in self.processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                for rank, process in enumerate(self.processes):
                    if process.poll() is None:
                        self._given_up.add(rank)
                        process.kill()
            time.sleep(0.05)
        codes = [process.returncode for process in self.processes]
        asked = (CTRL_C, PREEMPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)
        if self._sent is not None and any(code in asked for code in codes) and not self._causes():  # before training
            if self._sent == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(PREEMPTED)
        if PREEMPTED in codes and not any(_bad(code) for code in codes):
            raise SystemExit(PREEMPTED)
        if CTRL_C in codes and not any(_bad(code) for code in codes):
            raise KeyboardInterrupt
        if any(codes):
            self._explain(codes)
        return json.loads((self.private / "outcome-0.json").read_text(encoding="utf-8"))["interrupted"]

    def _explain(self, codes: list[int]) -> None:
        """Raise what went wrong first: not what the others said because of it."""
        said, causes = self._said(), self._causes()
        lost = [
            f"process {rank} {self._ending(rank, code)}{self._last(rank)}"
            for rank, code in enumerate(codes)
            if _bad(code) and not (self.private / f"error-{rank}.json").exists()
        ]
        if causes:
            first = causes[0]
            same = [each["rank"] for each in causes if each["text"] == first["text"]]
            who = "" if len(same) == len(codes) or first["rank"] == 0 else f"process {first['rank']}: "
            if first["mendable"]:
                if not (self.folder / CONFIG).exists():  # the run never began, and the sentence says why
                    shutil.rmtree(self.folder / "logs", ignore_errors=True)
                raise ValueError(f"{who}{first['text']}")
            raise LaunchError(f"process {first['rank']}: {first['text']}")
        if lost:
            raise LaunchError(f"{'; '.join(lost)}. What the processes wrote is in {relative(self.folder / 'logs')}.")
        raise LaunchError("\n".join(each["text"] for each in said) or f"the processes ended with {codes}")

    def _said(self) -> list[dict[str, Any]]:
        """What processes left, the earliest first."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.private.glob("error-*.json")]
        return sorted(found, key=lambda each: each["time"])

    def _causes(self) -> list[dict[str, Any]]:
        """Of that, what was not said because another process was gone."""
        return [each for each in self._said() if not any(word in each["text"] for word in _CONSEQUENCES)]

    def _ending(self, rank: int, code: int) -> str:
        if rank in self._given_up:
            return "hung when another had failed, and was ended"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _last(self, rank: int) -> str:
        """Where process ``rank`` said that it was."""
        file = self.folder / "logs" / f"heartbeat-{rank}.json"
        if not file.is_file():
            return ""
        beat = json.loads(file.read_text(encoding="utf-8"))
        return f" in step {beat['step']} ({beat['phase']})"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._sent = self._sent or number
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


class LaunchError(RuntimeError):
    """A process of the run failed; the text is its own."""


def _bad(code: int | None) -> bool:
    return code not in (None, 0, PREEMPTED, CTRL_C)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _die_with_the_parent() -> None:
    """Nobody would end the processes of a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
