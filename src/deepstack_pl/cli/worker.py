"""``python -m deepstack_pl.cli.worker FOLDER``: one process of a run; `launch` starts it and reads what it leaves.

What is heavy is imported inside: `launch` holds signals back until it is known here what they do.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from deepstack_pl.cli.ending import CTRL_C, PREEMPTING, end_now, ending_at_once, is_consequence
from deepstack_pl.cli.folders import CONFIG
from deepstack_pl.files import hold_with
from deepstack_pl.training.config import PREEMPTED

CALL = "call.json"


def main(private: Path) -> int:
    """Take part in the run that ``private`` describes; the exit status. Whatever ends it is left there in words."""
    rank = int(os.environ["RANK"])
    try:
        with ending_at_once():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *PREEMPTING})
            interrupted = _take_part(private, rank)
    except KeyboardInterrupt:
        return CTRL_C
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == PREEMPTED:
            return PREEMPTED
        _leave(private / f"error-{rank}.json", rank, error)
        return 1
    (private / f"outcome-{rank}.json").write_text(json.dumps({"interrupted": interrupted}), encoding="utf-8")
    return 0


def _take_part(private: Path, rank: int) -> bool:
    call = json.loads((private / CALL).read_text(encoding="utf-8"))
    sys.path[:] = call["path"]  # the folder of train.py, where callbacks of one's own may lie
    folder = Path(call["folder"])
    for handle in call["held"]:
        hold_with(handle)
    if rank:
        _write_to(folder / "logs" / f"rank-{rank}.log")
    from deepstack_pl.cli.resume import Resumed
    from deepstack_pl.cli.run import execute
    from deepstack_pl.config.load import load

    run, resumed = load(private / CONFIG, []), None
    if call["resumed"] is not None:
        its = call["resumed"]
        resumed = Resumed(
            run, Path(its["folder"]), Path(its["checkpoint"]), its["results"], its["named"], tuple(its["notes"])
        )
    return execute(run, folder, call["command"], arm=call["arm"], resumed=resumed, held=True)


def _leave(file: Path, rank: int, error: BaseException) -> None:
    """Say in ``file`` what ended this process: a sentence where it is one, as on the terminal of a run of one."""
    from deepstack_pl.config.errors import refusal

    text = refusal(error)
    said = {
        "rank": rank,
        "time": time.time(),
        "mendable": text is not None,
        "consequence": is_consequence(error),
        "text": "".join(traceback.format_exception(error)) if text is None else text,
    }
    file.write_text(json.dumps(said), encoding="utf-8")


def _write_to(file: Path) -> None:
    """From now on, whoever writes; what libraries print from C too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


if __name__ == "__main__":
    end_now(main, Path(sys.argv[1]))
