"""``python train.py``: read the command line, hand it to Hydra, and say in one sentence what is wrong with it.

Nothing heavy is imported before a run really starts, so that ``--help`` and ``--cfg job`` are instant.
"""

import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

from deepstack_pl.cli import points, resume
from deepstack_pl.cli.arms import state
from deepstack_pl.cli.command_line import CommandLine, call_hydra, folders
from deepstack_pl.cli.ending import end_now, ending_at_once, together, wait_to_speak
from deepstack_pl.cli.folders import RESULTS, Live, discard_if_empty
from deepstack_pl.cli.sweep import SweepReport
from deepstack_pl.config.errors import sentence
from deepstack_pl.config.load import from_hydra, register
from deepstack_pl.config.overrides import check, parse
from deepstack_pl.config.schema import Schema
from deepstack_pl.files import is_held
from deepstack_pl.training.config import PREEMPTED


@dataclass
class Jobs:
    """What Hydra calls for each run; in a sweep one failed arm does not stop the others, a Ctrl-C does."""

    schema: Schema
    command: str
    failed: bool = False
    interrupted: bool = False
    stopped: int = 0  # the exit status of an end at once, without a report

    def __call__(self, composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        if hydra_config.mode is not RunMode.MULTIRUN:
            try:
                self._start(composed, folder, [])
            except Exception as error:
                wait_to_speak(error)
                text = sentence(error, self.schema)
                if text is None:
                    raise
                print(text, file=sys.stderr)
                raise SystemExit(1) from error  # past Hydra, which would add a line of its own
            finally:
                discard_if_empty(folder)
            return
        self._arm(composed, folder, list(hydra_config.overrides.task))

    def _arm(self, composed: DictConfig, folder: Path, arm: list[str]) -> None:
        """One arm of a sweep; it never raises, so that Hydra goes on to the sweep's report."""
        tried = points.is_dry(composed)
        if self.interrupted:
            if not (folder / RESULTS).is_file():  # else it was begun before, and says how far it came
                self._leave_out(folder, arm, "the sweep was interrupted before it", "not started", tried)
            return
        try:
            self._start(composed, folder, arm)
        except (KeyboardInterrupt, SystemExit) as error:
            self.interrupted = True
            self.stopped = PREEMPTED if isinstance(error, SystemExit) and error.code == PREEMPTED else 130
            reason = "stopped at once by Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"exit {error.code}"
            print(f"{', '.join(arm)}: {reason}", file=sys.stderr)
            self._leave_out(folder, arm, reason, "interrupted", tried)
        except (points.AnotherRun, Live) as error:
            print(error, file=sys.stderr)
            self.failed = True
        except Exception as error:
            text = sentence(error, self.schema)
            print(text or traceback.format_exc(), file=sys.stderr)
            self._leave_out(folder, arm, text or f"{type(error).__name__}: {error}", "failed", tried)
            self.failed = True
        finally:
            discard_if_empty(folder)

    def _start(self, composed: DictConfig, folder: Path, arm: list[str]) -> None:
        run, resumed = from_hydra(composed, self.schema.files(HydraConfig.get().runtime.choices)), None
        if arm and not points.is_dry(composed):
            there = points.standing(run, folder)
            if there.finished:
                print(f"{', '.join(arm)}: finished already")
                return
            if there.aside:
                print(f"{', '.join(arm)}: ended before its first checkpoint; begun anew, the old one is {there.aside}")
            resumed = there.resumed
        from deepstack_pl.cli.run import execute

        self.interrupted |= execute(run, folder, self.command, arm=arm, resumed=resumed)

    def _leave_out(self, folder: Path, arm: list[str], reason: str, status: str, tried: bool) -> None:
        from deepstack_pl.cli.report import write_failure

        if not tried and not is_held(folder):  # else it is another process's, which says itself how it ends
            write_failure(folder, arm, reason, status)


def main(conf: Path, argv: Sequence[str]) -> int:
    """Train as ``argv`` says, with the options of ``conf``; the exit status."""
    with ending_at_once():
        if together() > 1:
            end_now(_main, conf, argv)
        return _main(conf, argv)


def _main(conf: Path, argv: Sequence[str]) -> int:
    line, command = CommandLine.read(argv), shlex.join(["python", "train.py", *argv])
    register()
    schema = Schema(folders(conf, line))
    try:
        _refuse_sweep_in_group(line)
        schema.refuse_namesakes()
        overrides = parse(line.overrides)
        check(overrides, schema)
        wanted = resume.asked_for(overrides)
        words = None if wanted in (None, "last") else points.words_of(Path(wanted))
        if words is not None:
            line = CommandLine.read([*words, *_of_a_sweep(line, str(wanted))])
            overrides = parse(line.overrides)
        elif wanted is not None:
            resumed = resume.prepare(wanted, overrides, line.flags, schema)
            from deepstack_pl.cli.run import execute

            execute(resumed.run, resumed.folder, command, resumed=resumed)
            return 0
        jobs, SweepReport.arms, SweepReport.failed = Jobs(schema, command), [], False
        call_hydra(conf, "train", [*line.flags, *line.overrides, *_arm_names(overrides)], jobs)
        failed = jobs.failed or SweepReport.failed or any(state(arm) == "failed" for arm in SweepReport.arms)
        return jobs.stopped or int(failed)
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 130
    except Exception as error:
        wait_to_speak(error)
        text = sentence(error, schema)
        if text is None:
            raise
        print(text, file=sys.stderr)
        return 1


def _of_a_sweep(line: CommandLine, folder: str) -> list[str]:
    """What a sweep is gone on with besides its own words: machines may change."""
    others = [word for word in line.overrides if not word.startswith("ckpt_path=")]
    wrong = [*line.flags, *(word for word in others if not word.lstrip("+").startswith(("hydra.", *resume.FREE)))]
    if wrong:
        raise ValueError(
            f"ckpt_path={folder} with {' '.join(wrong)}: a sweep goes on as it was begun, on other machines or with "
            "its data elsewhere at most. Leave it out, or start another sweep."
        )
    return [*others, f"hydra.sweep.dir={folder}"]


def _refuse_sweep_in_group(line: CommandLine) -> None:
    """Points of a sweep cannot share a group of processes: the second would meet what the first left of it."""
    several = together()
    if several > 1 and {"-m", "--multirun"} & {*line.flags}:
        raise ValueError(
            f"-m in one of {several} processes that were started together: a sweep starts the processes of each point "
            "itself. Start it once, without torchrun or srun; over several machines with hydra/launcher=submitit_slurm."
        )


def _arm_names(overrides: Sequence[Override]) -> list[str]:
    """Arms are named by what differs between them, not by what the whole sweep has in common."""
    common = [o.key_or_group for o in overrides if not o.is_sweep_override()]
    swept = len(common) < len(overrides) or "experiment" in common
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(common)}]"] if common and swept else []
