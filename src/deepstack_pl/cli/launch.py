"""Several processes for one run, started on this machine.

Each is a process of its own from the beginning, one group for each run, so that the points of a sweep never meet. Under
torchrun and srun they are there already, and nothing is started here.
"""

import ctypes
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from deepstack_pl.cli.blame import Ends, Record, bad
from deepstack_pl.cli.ending import PREEMPTING
from deepstack_pl.cli.folders import CONFIG, alone
from deepstack_pl.cli.machines import on_gpu, wanted
from deepstack_pl.cli.resume import Resumed
from deepstack_pl.cli.surroundings import cores
from deepstack_pl.cli.worker import CALL
from deepstack_pl.config.load import save
from deepstack_pl.config.run import RunConfig
from deepstack_pl.files import handed_down

_GRACE = 20.0  # seconds in which the others end by themselves once one has failed
_PATIENCE = 60.0  # and once one has ended as it was asked to: a logger may have much to hand over
_FORWARDED = (signal.SIGINT, *PREEMPTING, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def launch(run: RunConfig, folder: Path, command: str, arm: Sequence[str], resumed: Resumed | None) -> bool:
    """Start one process for each device of this machine, and wait for all; whether Ctrl-C ended them.

    Process 0 has this one's terminal, the others write to ``folder/logs``. Signals are handed on to all. They hold the
    folder together with this one, from before anything is written there.

    Raises:
        Live: another start holds it.
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
    with alone(folder, free=resumed is None and not arm) as held:
        record = Record.before(folder)
        try:
            with handed_down(held) as handed, _private(folder) as private, _Group(private, folder) as group:
                save(run, private / CONFIG)
                call = {"folder": str(folder), "held": handed, "command": command, "arm": list(arm), "resumed": None}
                if resumed is not None:
                    names = {"folder": str(resumed.folder), "checkpoint": str(resumed.checkpoint)}
                    its = {"results": resumed.results, "named": resumed.named, "notes": resumed.notes}
                    call["resumed"] = {**names, **its}
                (private / CALL).write_text(json.dumps({**call, "path": sys.path}), encoding="utf-8")
                group.start(there.devices, handed)
                return group.wait()
        except BaseException as error:
            record.close(error)
            raise


@contextmanager
def _private(folder: Path) -> Iterator[Path]:
    """Where the processes find their call and leave their words; in the run, where nobody overlooks what a launcher
    that was killed could not take away. The next start does.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for left in logs.glob("group-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="group-", dir=logs) as private:
        yield Path(private).resolve()


class _Group:
    """The processes of one run on this machine; none outlives it."""

    def __init__(self, private: Path, folder: Path) -> None:
        self.private, self.folder = private, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._old: dict[signal.Signals, Any] = {}
        self._since = time.time()
        self._complete = False  # all are started
        self._sent: list[int] = []  # the signals that were handed on, or will be
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

    def start(self, count: int, handed: Sequence[int] = ()) -> None:
        """Start ``count`` processes, which have the open files ``handed`` too."""
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores() // count)),
        }
        words = [sys.executable, "-P", "-m", "deepstack_pl.cli.worker", str(self.private)]
        for rank in range(count):
            environment = {**os.environ, **{n: str(v) for n, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}}
            self.processes.append(
                subprocess.Popen(
                    words, env=environment, start_new_session=True, preexec_fn=_before_it_begins, pass_fds=handed
                )
            )
        self._complete = True
        for number in self._sent:  # while they were being started
            self._send(number)

    def wait(self) -> bool:
        """All of them, however long it takes; where one ended before its time, the others for a while."""
        since: float | None = None
        while any(process.poll() is None for process in self.processes):
            limit = self._limit()
            if since is None and limit < math.inf:
                since = time.monotonic()
            if since is not None and time.monotonic() - since > limit:
                for rank, process in enumerate(self.processes):
                    if process.poll() is None:
                        self._given_up.add(rank)
                        process.kill()
            time.sleep(0.05)
        codes = [process.returncode for process in self.processes]
        ends = Ends(self.private, self.folder, self._since, codes, self._given_up)
        ends.require(self._sent[0] if self._sent else None)
        return json.loads((self.private / "outcome-0.json").read_text(encoding="utf-8"))["interrupted"]

    def _limit(self) -> float:
        """Seconds that those that go on have left."""
        codes = [process.poll() for process in self.processes]
        if len(self._sent) > 1 or any(bad(code) for code in codes):
            return _GRACE
        return _PATIENCE if any(codes) else math.inf

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._sent.append(number)
        if self._complete:
            self._send(number)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _before_it_begins() -> None:
    """In a new process: nobody would end it where its parent is killed; and a signal waits until it knows what to do
    with it (`worker`).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *PREEMPTING})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
