"""``deepstack COMMAND``: everything but training. ``deepstack --help`` lists the commands.

A command is a module of this room with ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which alone imports what
is heavy. What a user can mend is one sentence, without a traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol

from deepstack_pl.cli import (
    chat,
    compare,
    consolidate,
    convert,
    export,
    fetch,
    inspect,
    parity,
    serve,
    shards,
    study_page,
)


class Command(Protocol):
    """What a subcommand's module holds."""

    @property
    def HELP(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, args: argparse.Namespace, /) -> int: ...


COMMANDS: dict[str, Command] = {
    "chat": chat,
    "compare": compare,
    "consolidate": consolidate,
    "convert": convert,
    "export": export,
    "fetch": fetch,
    "inspect": inspect,
    "parity": parity,
    "report": study_page,
    "serve": serve,
    "shards": shards,
}


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; the exit status."""
    parser = argparse.ArgumentParser(
        prog="deepstack",
        description="DeepStack: corpora into shards, published checkpoints in and out, runs as Hugging Face folders, "
        "proof of agreement, reports, comparisons, figures, answers. Training is python train.py, asking benchmarks "
        "python evaluate.py.",
    )
    parser.add_argument("--version", action="version", version=version("deepstack_pl"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))
