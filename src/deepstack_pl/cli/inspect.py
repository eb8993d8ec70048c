"""``deepstack inspect RUN --image PAGE --prompt TEXT``: what a trained model does with one picture, as figures."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deepstack_pl.cli.folders import relative, with_model
from deepstack_pl.files import write_text

if TYPE_CHECKING:
    from deepstack_pl.inspection.inside import Inside

HELP = "what injections and attention do with a picture of yours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Asks a run about one picture and writes figures: the plan, the picture as it is dealt, how strong each "
        "injection is, what the answer's loss is without it, what it attends to; and all numbers as inspect.json."
    )
    parser.epilog = 'example: deepstack inspect outputs/latest --image page.png --prompt "What does it say?"'
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run's or an exported folder")
    parser.add_argument("--image", required=True, type=Path, metavar="FILE")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--answer", metavar="TEXT", help="whose loss is looked at; default: the model's own answer")
    parser.add_argument("--to", type=Path, metavar="DIR", help="default: inspect/NAME in the run's folder")


def run(args: argparse.Namespace) -> int:
    """Ask, draw and write; the exit status.

    Raises:
        ValueError: there is no such run or picture, or nothing to ask.
    """
    args.run = with_model(args.run)
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: there is nothing to ask. Write a question.")
    if not args.image.is_file():
        raise ValueError(f"--image {args.image}: there is no such file.")
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from deepstack_pl.batch import Record, Role, Turn
    from deepstack_pl.evaluation.runner import generate
    from deepstack_pl.inspection.dealt import dealt_figure
    from deepstack_pl.inspection.inside import look_inside
    from deepstack_pl.inspection.inside_figures import inside_figures
    from deepstack_pl.inspection.plots import plan_figure
    from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
    from deepstack_pl.multimodal.processor import DeepStackProcessor
    from deepstack_pl.vision.images import decode_image

    disable_progress_bar()
    picture = decode_image(args.image.read_bytes(), str(args.image))
    model = DeepStackForConditionalGeneration.from_pretrained(args.run).eval()
    processor = DeepStackProcessor.from_pretrained(args.run)
    asked = Turn(Role.user, f"<image>\n{args.prompt.strip()}")

    def record(answer: str) -> Record:
        return Record(key=args.image.name, turns=(asked, Turn(Role.assistant, answer)), images=(picture,))

    own = generate(model, processor, [record("")], 128)[0]
    answer = own if args.answer is None else args.answer
    if not answer.strip():
        raise ValueError("the answer is empty: there is no token whose loss could be looked at. Give --answer TEXT.")
    found = look_inside(model, processor, [record(answer)])
    folder = args.to or args.run / "inspect" / args.image.stem
    figures = {"plan": plan_figure(processor.plan, processor.tokens_per_view)}
    dealt = dealt_figure(picture, processor)
    figures |= {"dealt": dealt} if dealt is not None else {}
    figures |= inside_figures(found, processor.plan, picture)
    folder.mkdir(parents=True, exist_ok=True)
    for tag, figure in figures.items():
        figure.savefig(folder / f"{tag.replace('/', '_').replace(' ', '_')}.png")
    said = {"image": args.image.name, "prompt": args.prompt, "answered": own, "answer": answer, **found.to_dict()}
    write_text(folder / "inspect.json", json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    console = Console(highlight=False, soft_wrap=True)
    for line in [f"answered: {own}", *_lines(found), f"figures and inspect.json: {relative(folder)}"]:
        console.print(line, markup=False)
    return 0


def _lines(found: "Inside") -> list[str]:
    lines = [f"loss per token of the answer: {found.loss:.4f}, without any injection {found.loss_without:.4f}"]
    if not found.effects:
        lines = [f"loss per token of the answer: {found.loss:.4f}", "nothing is stacked: the plan has no injections"]
    for effect in found.effects:
        lines.append(
            f"  {effect.place}: {effect.ratio:.3f} of the stream's size, cosine {effect.cosine:+.3f}, without it the "
            f"loss is {effect.left_out:+.4f}"
        )
    if found.attention is not None:
        most = found.attention.with_all[found.attention.layer]
        lines.append(f"answer tokens attend most to visual ones in layer {found.attention.layer}: {most:.3f}")
    return [*lines, *([found.note] if found.note else [])]
