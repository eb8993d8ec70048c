"""``python -m deepstack_pl.cli.worker FOLDER``: one process of a run; `launch` starts it and reads what it leaves."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from deepstack_pl.cli.ending import end_now
from deepstack_pl.cli.folders import CONFIG
from deepstack_pl.cli.launch import CALL, CTRL_C


def main(private: Path) -> int:
    """Take part in the run that ``private`` describes; the exit status."""
    from deepstack_pl.cli.resume import Resumed
    from deepstack_pl.cli.run import execute
    from deepstack_pl.config.load import load

    rank = int(os.environ["RANK"])
    call, run = json.loads((private / CALL).read_text(encoding="utf-8")), load(private / CONFIG, [])
    folder = Path(call["folder"])
    if rank:
        _write_to(folder / "logs" / f"rank-{rank}.log")
    resumed = None
    if call["resumed"] is not None:
        its = call["resumed"]
        resumed = Resumed(
            run, Path(its["folder"]), Path(its["checkpoint"]), its["results"], its["named"], tuple(its["notes"])
        )
    try:
        interrupted = execute(run, folder, call["command"], arm=call["arm"], resumed=resumed)
    except KeyboardInterrupt:
        return CTRL_C
    except Exception as error:
        mendable = isinstance(error, ValueError)
        said = {
            "rank": rank,
            "time": time.time(),
            "mendable": mendable,
            "text": str(error) if mendable else traceback.format_exc(),
        }
        (private / f"error-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
        return 1
    (private / f"outcome-{rank}.json").write_text(json.dumps({"interrupted": interrupted}), encoding="utf-8")
    return 0


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
