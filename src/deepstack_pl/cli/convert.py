"""``deepstack convert SRC DST``: published checkpoints into this project's format, and back; Qwen3-VL's as a start.

Nothing heavy is imported before the command really runs, so that ``--help`` is instant.
"""

import argparse

HELP = "turn a published DeepStack checkpoint into this project's format, or back; or Qwen3-VL into a start"
_PUBLISHED = "published"
_INWARD = ("vision_tower", "tokenizer", "image_size", "template")  # options that have no meaning on the way back


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Turns a published checkpoint (DeepStack-L, -L-HD, -V; Llama or Phi-3; or a Qwen3-VL; safetensors) into a "
        "folder that from_pretrained loads, and that a run can start from (init_from=DST). Every tensor is used or "
        "named as an error; nothing is left behind where it fails."
    )
    parser.epilog = "example: deepstack convert menglc/deepstack-l-vicuna-7b checkpoints/deepstack-l-7b"
    parser.add_argument("source", metavar="SRC", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("destination", metavar="DST", help="a folder that is not there yet")
    parser.add_argument(
        "--to", choices=("deepstack_pl", _PUBLISHED), default="deepstack_pl", help="default: deepstack_pl"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder or hub name of the CLIP tower's config.json, where the checkpoint's mm_vision_tower does not lead "
        "to it; its weights are not read",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="folder or hub name, where the checkpoint holds none")
    parser.add_argument(
        "--image-size",
        metavar="PX",
        type=int,
        help="of a Qwen3-VL: side of a view; default: what its learned positions cover (768 for the released ones)",
    )
    parser.add_argument("--template", metavar="NAME", help="conversation template; default: the language model's")


def run(args: argparse.Namespace) -> int:
    """Convert; the exit status.

    Raises:
        ValueError: it cannot be done; the sentence says why.
    """
    from deepstack_pl.multimodal.convert import convert, convert_back
    from deepstack_pl.multimodal.published.files import CONFIG, checkpoint_folder, read_json
    from deepstack_pl.multimodal.qwen3_vl import MODEL_TYPE, convert_qwen3_vl

    if args.to == _PUBLISHED:
        given = [f"--{name.replace('_', '-')}" for name in _INWARD if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)} with --to {_PUBLISHED}: the model has its own. Leave it out.")
        convert_back(args.source, args.destination)
        return 0
    kind = read_json(checkpoint_folder(args.source) / CONFIG).get("model_type")
    if kind == MODEL_TYPE:
        if args.vision_tower is not None:
            raise ValueError("--vision-tower with a Qwen3-VL: the checkpoint holds its own. Leave it out.")
        convert_qwen3_vl(
            args.source,
            args.destination,
            image_size=args.image_size,
            tokenizer=args.tokenizer,
            template=args.template,
        )
    elif isinstance(kind, str) and kind.startswith(MODEL_TYPE):
        raise ValueError(f"{args.source} is a {kind}: of that family only {MODEL_TYPE} itself can be converted.")
    elif args.image_size is not None:
        raise ValueError(f"--image-size with a {kind}: its tower has one size. Leave it out.")
    else:
        convert(
            args.source,
            args.destination,
            vision_tower=args.vision_tower,
            tokenizer=args.tokenizer,
            template=args.template,
        )
    return 0
