"""``deepstack consolidate RUN``: a checkpoint's weights, whatever number of processes saved them, as one Hugging Face
folder.

Nothing heavy is imported before the command really runs, so that ``--help`` is instant.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deepstack_pl.cli.folders import CHECKPOINTS, LATEST, newest, relative
from deepstack_pl.training import checkpoints
from deepstack_pl.training.checkpoints import Checkpoint, all_of, verify

if TYPE_CHECKING:
    from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

HELP = "gather a checkpoint's weights into one Hugging Face folder, without a GPU"
WEIGHTS = "weights"  # below a run: what was gathered of its checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Gathers the weights of a run's newest whole checkpoint, however many processes saved it, into one folder that "
        "init_from and deepstack export take, with the run's configuration and processor. The run may be unfinished; "
        "every byte is verified first. It takes as much memory as the weights do, and no GPU."
    )
    parser.epilog = "example: deepstack consolidate outputs/my_run --step 500"
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        nargs="?",
        help=f"a folder that is not there yet; default: RUN/{WEIGHTS}/step-N",
    )
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest that is whole")


def run(args: argparse.Namespace) -> int:
    """Gather; the exit status.

    Raises:
        ValueError: there is no whole checkpoint, or it is not of the run's model; the sentence says why.
    """
    folder = newest() if args.run.absolute() == LATEST.absolute() else args.run
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give a run's (outputs/latest names the newest).")
    checkpoint, passed = _newest(folder) if args.step is None else (_of(folder, args.step), [])
    for line in passed:
        print(line)
    destination = args.destination or folder / WEIGHTS / checkpoint.folder.name
    tensors = consolidate(folder, checkpoint, destination)
    print(f"written to {relative(destination)}: {tensors} tensors of step {checkpoint.step}")
    return 0


def consolidate(run: Path, checkpoint: Checkpoint, destination: Path) -> int:
    """Write the weights of ``checkpoint`` to the new folder ``destination``; how many tensors they are.

    Raises:
        ValueError: they are not those of the model that ``run/config.json`` describes; nothing is left there then.
    """
    from deepstack_pl.multimodal.processor import DeepStackProcessor
    from deepstack_pl.multimodal.proof import stored_whole
    from deepstack_pl.multimodal.published.files import whole_or_nothing
    from deepstack_pl.multimodal.tensor_files import TensorFiles

    with whole_or_nothing(destination) as folder:
        model = _model(run, checkpoint)
        model.save_pretrained(folder, max_shard_size="5GB")
        DeepStackProcessor.from_pretrained(run).save_pretrained(folder)
        stored_whole(folder, model)
        return len(TensorFiles(folder))


def _model(run: Path, checkpoint: Checkpoint) -> "DeepStackForConditionalGeneration":
    """The run's model with the checkpoint's weights, in their own dtype; it never had others."""
    import warnings

    import torch
    from transformers.utils.logging import disable_progress_bar

    from deepstack_pl.multimodal.configuration import DeepStackConfig
    from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
    from deepstack_pl.training.restore import read_model

    disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is, and one process reads
    weights = read_model(checkpoint)
    with torch.device("meta"):
        model = DeepStackForConditionalGeneration(DeepStackConfig.from_pretrained(run))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differ:
        raise ValueError(
            f"{checkpoint.folder} is not of the model that {run / 'config.json'} describes: {len(differ)} tensors are "
            f"missing, left over or of another shape, the first being {', '.join(differ[:3])}. Put that file back as "
            "the run wrote it."
        )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    apart = sorted(name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name]))
    if apart:
        raise ValueError(
            f"{checkpoint.folder} holds {', '.join(apart[:3])} apart from the weights that the model has them share: "
            "one of the two would be lost."
        )
    return model


def _newest(run: Path) -> tuple[Checkpoint, list[str]]:
    found, passed = checkpoints.newest(run / CHECKPOINTS, deep=True)
    if found is None:
        why = " ".join(passed) or "It ended before its first one."
        raise ValueError(f"{relative(run)} holds no checkpoint that is whole. {why}")
    return found, passed


def _of(run: Path, step: int) -> Checkpoint:
    there = {checkpoint.step: checkpoint for checkpoint in all_of(run / CHECKPOINTS)}
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise ValueError(f"{relative(run)} holds no checkpoint of step {step}. There are: {steps}.")
    problems = verify(there[step])
    if problems:
        raise ValueError(
            f"{relative(there[step].folder)} is damaged: {'; '.join(problems[:3])}. Leave --step out for the newest "
            "that is whole."
        )
    return there[step]
