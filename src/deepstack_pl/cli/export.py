"""``deepstack export RUN DST``: a finished run as a folder that plain `transformers` loads, and proof that it is.

Nothing heavy is imported before the command really runs, so that ``--help`` is instant.
"""

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepstack_pl.cli.catalogue import UNKNOWN, licence_of, open_clip_repo
from deepstack_pl.cli.folders import CONFIG, LATEST, RECEIPT, RESULTS, newest, relative

if TYPE_CHECKING:
    from deepstack_pl.multimodal.card import Origin
    from deepstack_pl.vision.config import VisionConfig

HELP = "write a finished run as a folder that plain transformers loads, and prove it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Writes a finished run, or any folder of this project's, as one that plain transformers loads: weights, plan, "
        "tokenizer, generation settings, README.md. It loads it again and shows that logits are the run's, that "
        "generation with a cache is generation without, that leaving the injections out matters and that a prompt "
        "without an image works. Where one does not hold it fails, and leaves nothing."
    )
    parser.epilog = "example: deepstack export outputs/my_run exported/my_run --merge-lora --dtype bfloat16"
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run's folder, or one of save_pretrained")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that is not there yet")
    parser.add_argument(
        "--merge-lora", action="store_true", help="add adapters to the weights that they stand beside, and drop them"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as they are")


def run(args: argparse.Namespace) -> int:
    """Export; the exit status.

    Raises:
        ValueError: it cannot be done, or what was written is not the run's model; the sentence says why.
    """
    if args.run.absolute() == LATEST.absolute():  # a file that names the newest run
        args.run = newest()
    results = require_finished(args.run)
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from deepstack_pl.multimodal.export import export

    disable_progress_bar()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    lines: list[str] = []
    proofs = export(
        args.run,
        args.destination,
        merge=args.merge_lora,
        dtype=dtype,
        origin=origin_of(args.run, results),
        report=lines.append,
    )
    table = Table("proven", "found")
    for proof in proofs:
        table.add_row(proof.claim, proof.found)
    console = Console()
    console.print(table)
    for line in [*lines, f"how to load it: {relative(args.destination)}/README.md"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def require_finished(folder: Path) -> dict[str, Any]:
    """The results of the run in ``folder``; empty where the folder is no run's, but one of save_pretrained.

    Raises:
        ValueError: there is no such folder, or its run did not come to its end.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give a run's (outputs/latest names the newest).")
    file = folder / RESULTS
    if not file.is_file():
        if (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is a run that never began to train. Go on with it: {_go_on(folder)}.")
        return {}
    from deepstack_pl.multimodal.published.files import read_json

    results = read_json(file)
    if results.get("status") != "finished":
        raise ValueError(
            f"{folder}: the run is not finished, but {results.get('status')}, at step {results.get('steps')} of "
            f"{results.get('max_steps')}, and its results are not those of its weights. Go on with it: "
            f"{_go_on(folder)}; trainer.max_steps={results.get('steps')} there ends it where it is."
        )
    return results


def origin_of(folder: Path, results: dict[str, Any]) -> "Origin":
    """What the run's records tell of where its model comes from."""
    from deepstack_pl.cli.provenance import versions
    from deepstack_pl.config.load import load
    from deepstack_pl.language.config import LLMInit
    from deepstack_pl.multimodal.card import Origin
    from deepstack_pl.vision.config import VisionInit

    receipt = folder / RECEIPT
    known: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        run = load(folder / CONFIG, [])
        own = (f"those of {Path(run.init_from).name}" if run.init_from else "drawn at random", "its own")
        vision = _weights(run.vision.weights, _repo(run.vision)) if run.vision.init is VisionInit.pretrained else own
        llm = _weights(run.llm.checkpoint, run.llm.checkpoint) if run.llm.init is LLMInit.pretrained else own
        known = {"weights": {"vision": vision, "llm": llm}, "data": run.data.name}
    return Origin(
        run=folder.resolve().name,
        receipt=hashlib.sha256(receipt.read_bytes()).hexdigest()[:16] if receipt.is_file() else None,
        versions=versions(),
        **known,
    )


def _weights(named: str | None, repo: str | None) -> tuple[str, str]:
    """What weights are called, and the licence of the repository they come from."""
    licence = licence_of(repo) if repo else UNKNOWN
    return str(named), f"{licence} of {repo or named}" if licence == UNKNOWN else licence


def _repo(vision: "VisionConfig") -> str | None:
    """Where on the hub the tower's weights are; None where they are elsewhere."""
    if vision.open_clip_model is None or vision.open_clip_weights is None:
        return vision.checkpoint
    return open_clip_repo(vision.open_clip_model, vision.open_clip_weights)


def _go_on(folder: Path) -> str:
    return f"python train.py ckpt_path={relative(folder)}"
