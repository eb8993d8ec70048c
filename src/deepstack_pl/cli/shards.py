"""``deepstack shards ACTION``: corpora into shards, shards proved, one record opened, the batches of an epoch planned.

An action is a module of this room with ``HELP``, ``EXAMPLE``, ``OWN`` and ``run(run, own)``: its words are overrides of
the run's configuration, as for train.py, and the few of its own that ``OWN`` explains.
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Protocol

from deepstack_pl.cli import shards_build, shards_plan, shards_show, shards_verify
from deepstack_pl.config.run import RunConfig

HELP = "LLaVA-format corpora into WebDataset shards; verify, show, plan"


class Action(Protocol):
    """What an action's module holds."""

    @property
    def HELP(self) -> str: ...

    @property
    def EXAMPLE(self) -> str: ...

    @property
    def OWN(self) -> dict[str, str]:
        """Words that are no overrides: name and explanation."""
        ...

    def run(self, run: RunConfig, own: dict[str, str], /) -> int:
        """The exit status; ``own`` holds those of `OWN` that were given."""
        ...


ACTIONS: dict[str, Action] = {
    "build": shards_build,
    "verify": shards_verify,
    "show": shards_show,
    "plan": shards_plan,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = "Turns corpora into WebDataset shards, proves them, and shows what a run makes of them."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        own = "".join(f"\n  {key + '=':<12} {text}" for key, text in action.OWN.items())
        sub = actions.add_parser(
            name,
            help=action.HELP,
            description=f"{action.HELP[0].upper()}{action.HELP[1:]}.",
            epilog=(f"of its own:{own}\n\n" if own else "") + f"example: {action.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("words", metavar="KEY=VALUE", nargs="*", help="as for train.py: data=llava665k data.root=DIR")


def run(args: argparse.Namespace) -> int:
    """Run the action; the exit status.

    Raises:
        ValueError: something that the user can mend.
    """
    from deepstack_pl.cli.compose import compose

    action = ACTIONS[args.action]
    own, overrides = _sorted_out(args.words, action.OWN)
    return action.run(compose(overrides), own)


def _sorted_out(words: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The action's own words, and the overrides.

    Raises:
        ValueError: a word that nearly is one of the action's own, or a second name of a record.
    """
    own: dict[str, str] = {}
    overrides = []
    for word in words:
        key, is_assignment, value = word.partition("=")
        name = key if is_assignment else "which"
        if name not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
            if near and is_assignment:
                raise ValueError(f"Unknown key {key}. Did you mean {near[0]}?")
            overrides.append(word)
        elif name in own:
            raise ValueError(f"{word}: {own[name]} was given already. Give one.")
        else:
            own[name] = value if is_assignment else word
    return own, overrides
