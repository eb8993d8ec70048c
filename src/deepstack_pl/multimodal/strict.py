"""Every tensor is used, or named in an error: a checkpoint against the model of its configuration."""

from collections.abc import Mapping, Sequence

import torch

from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.published.files import CONFIG
from deepstack_pl.multimodal.published.keys import named
from deepstack_pl.multimodal.tensor_files import TensorFiles

Shapes = dict[str, tuple[int, ...]]


def own_shapes(config: DeepStackConfig) -> Shapes:
    """The tensors of the model that ``config`` describes, shared ones once; nothing is allocated.

    Raises:
        ValueError: there can be no such model.
    """
    try:
        with torch.device("meta"):
            model = DeepStackForConditionalGeneration(config)
    except Exception as error:  # whatever transformers and torch say to odd sizes
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise ValueError(f"{CONFIG}: no such model can be built ({reason}). Correct it.") from error
    once: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        once.setdefault(id(tensor), name)
    return {name: tuple(state[name].shape) for name in once.values()}


def check_tensors(
    expected: Shapes, files: TensorFiles, found: Mapping[str, str], source: str, spare: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint that is not exactly the model of its config.json."""
    missing, left_over = (
        sorted(expected.keys() - found.keys()),
        sorted(found[n] for n in found.keys() - expected.keys()),
    )
    reshaped = [
        f"{found[name]} {files.shape(found[name])}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if files.shape(found[name]) != expected[name]
    ]
    wrong = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", reshaped))
        if names
    ]
    twice = sorted(set(files) - {*found.values(), *spare})
    if twice:
        wrong.append(f"{len(twice)} there under two names: {named(twice)}")
    if wrong:
        raise ValueError(
            f"{source} is not the model of its config.json, which has {len(expected)} tensors. {'; '.join(wrong)}. "
            "Correct config.json, name the right tower, or fetch the checkpoint again; nothing was written."
        )
