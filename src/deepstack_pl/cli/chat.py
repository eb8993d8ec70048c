"""``deepstack chat RUN``: questions and answers on the terminal, with pictures, turn by turn."""

import argparse
from pathlib import Path

from deepstack_pl.cli.folders import with_model
from deepstack_pl.serving.config import Limits, Settings

HELP = "ask a trained model on the terminal, with pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Asks a run's or an exported folder, turn by turn; answers appear as they are written. /image FILE adds a "
        "picture to the next question, /injections on|off switches them, /reset begins anew, /quit or Ctrl-D ends; "
        "Ctrl-C stops an answer. Without a terminal each line of the input is a question."
    )
    parser.epilog = 'example: deepstack chat outputs/latest --image page.png --prompt "What does it say?"'
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run's or an exported folder")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="of the first question; may be repeated"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this alone, and end")
    parser.add_argument("--no-injection", action="store_true", help="leave every group of the plan out")
    parser.add_argument(
        "--max-tokens", type=int, default=Limits().tokens, metavar="N", help="of an answer; default: %(default)s"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampled answers; default: another one each time")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")


def run(args: argparse.Namespace) -> int:
    """Talk; the exit status: 1 where a question was not answered and nobody was there to see why.

    Raises:
        ValueError: there is no such run, picture or device, or nothing to ask.
    """
    settings = Settings(injections=not args.no_injection, temperature=args.temperature, seed=args.seed)
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens}: an answer has at least 1.")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: there is nothing to ask. Write a question.")
    folder = with_model(args.run)
    from transformers.utils.logging import disable_progress_bar

    from deepstack_pl.serving.session import Session
    from deepstack_pl.serving.talk import Talk, read_picture

    disable_progress_bar()
    pictures = [read_picture(file) for file in args.image]
    talk = Talk(Session.load(folder, args.device), settings, args.max_tokens, pictures)
    return talk.ask(args.prompt) if args.prompt is not None else talk.run()
