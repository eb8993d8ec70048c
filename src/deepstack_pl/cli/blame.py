"""Why a run of several processes ended: what went wrong first, said once and kept in results.json. Loads without torch.

What a process leaves for it: ``error-N.json`` (`worker`), its exit status, and its last heartbeat.
"""

import json
import shutil
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstack_pl.cli.ending import CTRL_C
from deepstack_pl.cli.folders import CONFIG, relative
from deepstack_pl.cli.report import read_results, write_results
from deepstack_pl.training.config import PREEMPTED


class LaunchError(RuntimeError):
    """A process of the run failed; the text is its own."""


def bad(code: int | None) -> bool:
    """Whether an exit status is that of a process that failed; None: it goes on."""
    return code not in (None, 0, PREEMPTED, CTRL_C)


@dataclass(frozen=True, slots=True)
class Ends:
    """How the processes of one group ended.

    Attributes:
        private: where they left their words.
        folder: the run's.
        since: when they were started.
        codes: their exit statuses, in the order of their numbers.
        given_up: those that had to be ended.
    """

    private: Path
    folder: Path
    since: float
    codes: Sequence[int]
    given_up: Collection[int] = ()

    def require(self, asked: int | None) -> None:
        """Nothing, where all ended well; ``asked`` is the signal that was handed on to them, if one was.

        Raises:
            ValueError, LaunchError: what went wrong first: not what the others said because of it.
            SystemExit: they were preempted.
            KeyboardInterrupt: they were stopped at once.
        """
        failed = any(bad(code) for code in self.codes)
        stopped = {CTRL_C, PREEMPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1} & {*self.codes}
        if asked is not None and (stopped or self.given_up) and not self._causes():
            raise KeyboardInterrupt if asked == signal.SIGINT else SystemExit(PREEMPTED)
        if not failed and PREEMPTED in self.codes:
            raise SystemExit(PREEMPTED)
        if not failed and CTRL_C in self.codes:
            raise KeyboardInterrupt
        if failed:
            raise self._why()

    def _why(self) -> Exception:
        said, causes = self._said(), self._causes()
        lost = [
            f"process {rank} {self._ending(rank, code)}{self._last(rank)}"
            for rank, code in enumerate(self.codes)
            if bad(code) and not any(each["rank"] == rank for each in said)
        ]
        if causes:
            first = causes[0]
            same = [each["rank"] for each in causes if each["text"] == first["text"]]
            who = "" if len(same) == len(self.codes) or first["rank"] == 0 else f"process {first['rank']}: "
            if first["mendable"]:
                return ValueError(f"{who}{first['text']}")
            return LaunchError(f"process {first['rank']}: {first['text']}")
        if lost:
            return LaunchError(f"{'; '.join(lost)}. What the processes wrote is in {relative(self.folder / 'logs')}.")
        return LaunchError(f"process {said[0]['rank']}: {said[0]['text']}")

    def _said(self) -> list[dict[str, Any]]:
        """What processes left, the earliest first."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.private.glob("error-*.json")]
        return sorted(found, key=lambda each: each["time"])

    def _causes(self) -> list[dict[str, Any]]:
        """Of that, what was not said because another process was gone."""
        return [each for each in self._said() if not each["consequence"]]

    def _ending(self, rank: int, code: int) -> str:
        if rank in self.given_up:
            return "hung when another had ended, and was ended"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _last(self, rank: int) -> str:
        """Where process ``rank`` said that it was; what an earlier start left says nothing of this one."""
        file = self.folder / "logs" / f"heartbeat-{rank}.json"
        beat = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"time": 0.0}
        return f" in step {beat['step']} ({beat['phase']})" if beat["time"] >= self.since else ""


@dataclass(frozen=True, slots=True)
class Record:
    """results.json of a run whose process 0 may not have been able to finish it."""

    folder: Path
    starts: int

    @classmethod
    def before(cls, folder: Path) -> "Record":
        """As it is before the processes are started."""
        return cls(folder, len(read_results(folder).get("starts", [])))

    def close(self, error: BaseException) -> None:
        """Note what the group ended by; a start that was refused before it wrote leaves all as it was."""
        results = read_results(self.folder)
        if len(results.get("starts", [])) <= self.starts:
            if not (self.folder / CONFIG).exists():  # the run never began, and what is printed says why
                shutil.rmtree(self.folder / "logs", ignore_errors=True)
            return
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        status = "interrupted" if stopped else "failed"
        if stopped and results["status"] in ("interrupted", "finished"):
            return  # process 0 knew more of it
        reason = "stopped at once" if stopped else str(error).strip().splitlines()[-1]
        write_results(self.folder, {**results, "status": status, "interrupted": stopped, "reason": reason})
