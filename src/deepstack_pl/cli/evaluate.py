"""``python evaluate.py``: read the command line, hand it to Hydra, and say in one sentence what is wrong with it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from deepstack_pl.cli.command_line import CommandLine, call_hydra, folders
from deepstack_pl.cli.ending import CTRL_C, end_now, ending_at_once, together, wait_to_speak
from deepstack_pl.config.errors import sentence
from deepstack_pl.config.evaluate import EvaluateConfig
from deepstack_pl.config.load import evaluate_from_hydra, register
from deepstack_pl.config.overrides import check, parse
from deepstack_pl.config.schema import Schema


def main(conf: Path, argv: Sequence[str]) -> int:
    """Evaluate as ``argv`` says, with the options of ``conf``; the exit status."""
    with ending_at_once():
        if together() > 1:
            end_now(_main, conf, argv)
        return _main(conf, argv)


def _main(conf: Path, argv: Sequence[str]) -> int:
    line, command = CommandLine.read(argv), shlex.join(["python", "evaluate.py", *argv])
    register()
    schema = Schema(folders(conf, line), EvaluateConfig)

    status = 0

    def job(composed: DictConfig) -> None:
        nonlocal status
        try:
            config = evaluate_from_hydra(composed)
            from deepstack_pl.cli.evaluation import execute

            execute(config, command)
        except Exception as error:
            status = _say(error, schema)  # here: Hydra would add a line of its own

    try:
        if {"-m", "--multirun"} & {*line.flags}:
            raise ValueError("-m: evaluate.py takes one model at a time. Call it once for each, in a shell's loop.")
        schema.refuse_namesakes()
        check(parse(line.overrides), schema)
        call_hydra(conf, "evaluate", [*line.flags, *line.overrides], job)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C. Answers to benchmarks are kept: the same command goes on.", file=sys.stderr)
        return CTRL_C
    except Exception as error:
        return _say(error, schema)
    return status


def _say(error: Exception, schema: Schema) -> int:
    """The exit status, once the sentence is said; what has none keeps its traceback."""
    wait_to_speak(error)
    text = sentence(error, schema)
    if text is None:
        raise error
    print(text, file=sys.stderr)
    return 1
