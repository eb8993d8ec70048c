"""``deepstack serve RUN``: a trained model behind OpenAI's chat API, and a page to ask it on."""

import argparse
import sys
from pathlib import Path

from deepstack_pl.cli.folders import with_model
from deepstack_pl.serving.config import Limits

HELP = "answer over HTTP: OpenAI's chat API, and a page to ask on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    usual = Limits()
    parser.description = (
        "Loads a run's or an exported folder and answers: /v1/chat/completions as OpenAI's API writes it, and a page "
        "at / with pictures, streaming, and each question with and without injections. There is no authentication: "
        "it listens on this machine alone unless --host says otherwise."
    )
    parser.epilog = "example: deepstack serve outputs/latest --port 8000   (docs/serving.md)"
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run's or an exported folder")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: any that is free")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="requests may name pictures below it by file:// address"
    )
    parser.add_argument(
        "--max-body-mb", type=float, default=usual.body / 2**20, metavar="N", help="of a request; default: %(default)g"
    )
    parser.add_argument(
        "--max-images", type=int, default=usual.images, metavar="N", help="of a conversation; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=usual.tokens, metavar="N", help="of an answer; default: %(default)s"
    )
    parser.add_argument(
        "--queue", type=int, default=usual.queue, metavar="N", help="requests that wait; default: %(default)s"
    )
    parser.add_argument(
        "--max-batch", type=int, default=usual.batch, metavar="N", help="answered together; default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the exit status.

    Raises:
        ValueError: there is no such run, device or folder of pictures, or the extra [serve] is not installed.
    """
    limits = Limits(
        body=int(args.max_body_mb * 2**20),
        images=args.max_images,
        tokens=args.max_tokens,
        queue=args.queue,
        batch=args.max_batch,
    )
    folder = with_model(args.run)
    if args.image_root is not None and not args.image_root.is_dir():
        raise ValueError(f"--image-root {args.image_root}: there is no such folder.")
    try:
        import fastapi  # noqa: F401 - what is missing is said before the model is loaded
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"deepstack serve needs {error.name}: pip install -e .[serve]") from error
    from transformers.utils.logging import disable_progress_bar

    from deepstack_pl.serving.guard import LOCAL
    from deepstack_pl.serving.server import serve
    from deepstack_pl.serving.session import Session

    disable_progress_bar()
    if args.host not in LOCAL:
        print(
            f"--host {args.host}: whoever reaches this address can ask: there is no authentication and no encryption. "
            "Put a proxy that has both before it, or leave --host out.",
            file=sys.stderr,
        )
    session = Session.load(folder, args.device)

    def ready(address: str) -> None:
        print(f"{session.name} on {session.model.device}, plan {session.plan.digest}")
        print(f"page: {address}/   API: {address}/v1   Ctrl-C ends", flush=True)

    try:
        serve(session, limits, host=args.host, port=args.port, root=args.image_root, ready=ready)
    except KeyboardInterrupt:  # the way to end it
        print("stopped by Ctrl-C", file=sys.stderr)
    return 0
