"""How a process ends: at once when it is asked outside of training, and one of several with its own exit status. Loads
without torch.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from deepstack_pl.training.config import PREEMPTED

CTRL_C = 130  # exit status of a process that it stopped at once
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)
_OTHERS_FIRST = 10.0  # seconds until a process says what it met because another one was gone
_FIRST_FIRST = 3.0  # seconds until any but process 0 says what process 0 may have said


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While it lasts SIGTERM and SIGUSR1 are a `SystemExit` with `PREEMPTED`, as Ctrl-C is a `KeyboardInterrupt`: what
    was begun is noted on its way out. In training `GracefulStop` takes their place, and gives it back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only, and only there may it be said what they do
        return
    pid = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:  # a forked data worker: the main process speaks for all
            if number == signal.SIGTERM:
                os._exit(PREEMPTED)
            return
        if number_here() == 0:  # print is not safe inside a handler: it may interrupt another print
            os.write(2, f"\nstopping at once: {signal.Signals(number).name}, the machine is wanted\n".encode())
        raise SystemExit(PREEMPTED)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *PREEMPTING)}  # Lightning may change it
    for number in PREEMPTING:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_now(main: Callable[..., int], *args: Any) -> NoReturn:
    """Call ``main`` and end with its status, past Python's own taking apart: threads of torch's process groups that it
    meets there abort the process now and then, and a batch system would be told of a crash.
    """
    try:
        status = main(*args)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = CTRL_C
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def together() -> int:
    """How many processes torchrun or srun has started with this one."""
    return max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def number_here() -> int:
    """This process's number among those, before they have met."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")


def wait_to_speak(error: BaseException) -> None:
    """Call this before ``error`` is printed. Of processes that were started together one says what is wrong: the first
    that ends takes the others with it, and who only repeats it, or met what followed from it, gives it the time.
    """
    if together() > 1:
        time.sleep(_OTHERS_FIRST if is_consequence(error) else _FIRST_FIRST if number_here() else 0)


def is_consequence(error: BaseException | None) -> bool:
    """Whether ``error`` is what a process meets because another one is gone, or does not answer: torch's own kinds, and
    gloo's, which are a plain RuntimeError with a place in its source. A download that times out is neither.
    """
    while error is not None:
        if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
            return True
        if type(error) is RuntimeError and "gloo/" in str(error):
            return True
        error = error.__cause__
    return False
