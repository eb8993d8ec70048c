"""Where a run starts: another run's weights, if they are this model's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME

from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.lora import is_adapter, without_adapters
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.tensor_files import INDEX, SINGLE, TensorFiles

_OF_THE_PLAN = ("gates.", "image_newline", "own_projectors.")  # what a plan owns, and not the parts it joins
# Of the LLM's configuration: where it came from, how it was drawn, what `generate` does by default.
_NO_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
}


def load_weights(model: DeepStackForConditionalGeneration, folder: str | Path) -> list[str]:
    """Start ``model`` from the weights of a run or an exported folder; the plans may differ, the tensors may not.

    Returns what stays as it was drawn: gates and newline of a plan that folder's plan had none of, and the adapters of
    a part, as one, where that folder holds none.

    Raises:
        ValueError: no weights there, or tensors of other names or shapes.
    """
    require_weights(folder)
    theirs = DeepStackConfig.from_pretrained(folder)
    _refuse_another_architecture(model.config, theirs, folder)
    _refuse_other_adapters(model.config, theirs, folder)
    _refuse_other_taps(model, theirs, folder)
    files, state = TensorFiles(Path(folder)), model.state_dict(keep_vars=True)
    adapted = []
    if not theirs.lora:  # its weights are those that adapters stand beside
        adapted = [f"{part}'s adapters" for part in model.config.lora]
        state = {without_adapters(name): tensor for name, tensor in state.items() if not is_adapter(name)}
    shared = {name for group in _tied(state) for name in group if group & files.keys()}
    missing = sorted(state.keys() - files.keys() - shared)
    drawn = [name for name in missing if name.startswith(_OF_THE_PLAN)]
    missing = [name for name in missing if name not in drawn]
    left_over = sorted(files.keys() - state.keys())
    owned = [name for name in left_over if name.startswith(_OF_THE_PLAN)]
    if owned:
        raise ValueError(
            f"init_from={folder}: that run's plan owns {', '.join(owned)}, and this one has no place for it. Take a "
            "model= with gates, newlines or projectors of its own like that run's, or start from another run."
        )
    reshaped = sorted(n for n in files if n in state and tuple(state[n].shape) != files.shape(n))
    if missing or left_over or reshaped:
        raise ValueError(
            f"init_from={folder} does not fit this model: missing {missing[:3]}, left over {left_over[:3]}, of another "
            f"shape {reshaped[:3]}. llm=, vision= and projector= must be those of that run; so must model.pooling "
            "where squares are joined, model.sequence and model.tiles where groups stand in the channels, the number "
            "of gates, and whether anything but taps reads the projector."
        )
    for name in files:  # one by one: two copies of a large model need not fit
        state[name].detach().copy_(files[name])
    return drawn + adapted


def require_weights(folder: str | Path) -> None:
    """Refuse a folder to start from that holds no weights.

    Raises:
        ValueError: naming the folder, and what to give instead.
    """
    values = Path(folder) / CONFIG_NAME
    kind = json.loads(values.read_text(encoding="utf-8")).get("model_type") if values.is_file() else None
    if kind is not None and kind != DeepStackConfig.model_type:
        raise ValueError(
            f"init_from={folder}: its config.json is of a {kind}. Give a folder of this project's; one of a published "
            f"DeepStack checkpoint becomes that with `deepstack convert {folder} FOLDER`."
        )
    if not any((Path(folder) / name).is_file() for name in (SINGLE, INDEX)):
        raise ValueError(
            f"init_from={folder}: there is no {SINGLE}, nor an index of shards. Give the folder of a finished run "
            "(outputs/latest names the newest), or one written by save_pretrained or `deepstack convert`."
        )


def _refuse_another_architecture(own: DeepStackConfig, theirs: DeepStackConfig, folder: str | Path) -> None:
    """Values that shapes do not show: heads, rotary base, activation, pixel statistics."""
    ignored = {
        "name",
        "init",
        "checkpoint",
        "open_clip_model",
        "open_clip_weights",
    }  # where weights came from, not what they are
    pairs = {
        "llm": (
            own.text_config.to_dict(),
            theirs.text_config.to_dict(),
            _NO_ARCHITECTURE,
        ),
        "vision": (vision_values(own.typed_vision()), vision_values(theirs.typed_vision()), ignored),
        "projector": (_projector_values(own), _projector_values(theirs), set()),
    }
    differ = [
        f"{part}.{key} ({mine.get(key)}, there {other.get(key)})"
        for part, (mine, other, skip) in pairs.items()
        for key in sorted((mine.keys() | other.keys()) - skip)
        if mine.get(key) != other.get(key)
    ]
    if differ:
        raise ValueError(
            f"init_from={folder} is of another architecture: {', '.join(differ[:4])}. llm=, vision= and projector= "
            "must be those of that run."
        )


def _refuse_other_taps(model: DeepStackForConditionalGeneration, theirs: DeepStackConfig, folder: str | Path) -> None:
    """A tap's projector belongs to a depth, and is named by its place in the list."""
    before, now = theirs.typed_plan().taps, model.plan.taps
    moved = [k for k, (one, two) in enumerate(zip(before, now, strict=False)) if one != two]
    if any(f"tap_{k}" in model.own_projectors for k in moved):
        raise ValueError(
            f"init_from={folder}: its projectors read the hidden states {list(before)}, but this plan taps "
            f"{list(now)}. Say model.taps={list(before)}, or start from another run."
        )


def _refuse_other_adapters(own: DeepStackConfig, theirs: DeepStackConfig, folder: str | Path) -> None:
    held, wanted = (
        {part: replace(lora, dropout=0.0) for part, lora in config.typed_lora().items()} for config in (theirs, own)
    )
    if held and held != wanted:  # dropout is no part of the weights
        raise ValueError(
            f"init_from={folder} holds adapters ({_adapters(theirs)}), and this run has {_adapters(own)}. Merge them "
            f"into the weights first (deepstack export {folder} FOLDER --merge-lora) and start from FOLDER, or give "
            "stage.vision.lora and stage.llm.lora that run's values."
        )


def _adapters(config: DeepStackConfig) -> str:
    held = [f"{part}: {', '.join(f'{k} {v}' for k, v in values.items())}" for part, values in config.lora.items()]
    return "; ".join(held) or "none"


def _projector_values(config: DeepStackConfig) -> dict[str, Any]:
    return {"kind": config.projector, "sharing": config.projector_sharing}


def _tied(state: Mapping[str, Tensor]) -> list[set[str]]:
    """Names that share one tensor."""
    names: dict[int, set[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), set()).add(name)
    return [group for group in names.values() if len(group) > 1]
