"""From values to a model: random, pretrained or on the meta device; and its parts by name."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from deepstack_pl.language.config import LLMConfig, LLMInit
from deepstack_pl.multimodal.config import LoRAConfig, ProjectorConfig, build_plan
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.lora import is_adapter, without_adapters
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.tensor_files import INDEX, SINGLE, TensorFiles
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.vision.config import VisionConfig, VisionInit

_OF_THE_PLAN = ("gates.", "image_newline", "own_projectors.")  # what a plan owns, and not the parts it joins
PARTS = ("vision", "projector", "llm")
_PREFIXES = {
    "vision_tower": "vision",
    "projector": "projector",
    "own_projectors": "projector",
    "gates": "projector",
    "image_newline": "projector",
    "language_model": "llm",
}


def build_model(
    model: ModelConfig,
    llm: LLMConfig,
    vision: VisionConfig,
    projector: ProjectorConfig,
    *,
    seed: int,
    image_token_id: int,
    device: str = "cpu",
    start: str | Path | None = None,
    lora: Mapping[str, LoRAConfig] | None = None,
) -> DeepStackForConditionalGeneration:
    """Build the model; on ``device="meta"`` shapes alone, without weights or network. ``lora`` names the parts that
    hold adapters.

    With ``start``, a folder whose weights follow (`load_weights`, or a checkpoint of a run that began there), nothing
    is fetched: of a pretrained LLM the configuration comes from there, too.

    Raises:
        ValueError: the plan does not fit, or pretrained weights are not at hand.
    """
    plan = build_plan(model, llm, vision)
    meta = device == "meta"
    pretrained = llm.init is LLMInit.pretrained and not meta
    config = DeepStackConfig(
        text_config=checkpoint_config(llm, start) if pretrained else text_config(llm),
        vision=vision_values(vision),
        projector=projector.kind.value,
        projector_sharing=projector.sharing.value,
        plan=plan.to_dict(),
        template=llm.template,
        image_token_id=image_token_id,
        sample_max_length=llm.max_length,
        sample_too_long=llm.too_long.value,
        init_seed=seed,
    )
    config._attn_implementation = llm.attention.value
    with torch.device(device):
        built = DeepStackForConditionalGeneration(config)
    if pretrained and start is None:
        built.language_model.load_state_dict(_checkpoint(llm).state_dict())
    if vision.init is VisionInit.pretrained and start is None and not meta:
        built.vision_tower.tower.load_pretrained()
    with torch.device(device):
        built.adapt(lora or {})  # after weights that know nothing of them
    return built


def parts(model: DeepStackForConditionalGeneration) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter, by the part it belongs to; gates and the newline belong to the projector."""
    sorted_in: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        sorted_in[_PREFIXES[name.split(".")[0]]].append((name, parameter))
    return sorted_in


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
            f"shape {reshaped[:3]}. llm=, vision= and projector= must be those of that run, and where "
            "groups stand in the channels model.sequence and model.tiles, too."
        )
    for name in files:  # one by one: two copies of a large model need not fit
        state[name].detach().copy_(files[name])
    return drawn + adapted


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


def _refuse_other_adapters(own: DeepStackConfig, theirs: DeepStackConfig, folder: str | Path) -> None:
    if theirs.lora and theirs.typed_lora() != own.typed_lora():
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


# Values as config.json files on the hub spell them, and where transformers keeps what they say.
OLDER = {
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
    "rope_local_base_freq": "rope_parameters",
    "partial_rotary_factor": "rope_parameters",
    "sliding_window_pattern": "layer_types",
}
# Ends of texts are the tokenizer's and the template's affair, and revisions of one checkpoint differ in them.
_OF_THE_TEXT = {"bos_token_id", "eos_token_id", "pad_token_id"}


def text_config(llm: LLMConfig) -> PreTrainedConfig:
    """The Hugging Face configuration that conf's values describe."""
    if llm.family not in CONFIG_MAPPING:
        raise ValueError(f"llm.family={llm.family}: no model type of transformers. Its documentation lists them.")
    return CONFIG_MAPPING[llm.family](**deepcopy(llm.built))  # transformers writes into rope_scaling


def _tied(state: Mapping[str, Tensor]) -> list[set[str]]:
    """Names that share one tensor."""
    names: dict[int, set[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def _named(llm: LLMConfig) -> str:
    if llm.checkpoint is None:
        raise ValueError(
            f"llm={llm.name}: llm.init=pretrained needs llm.checkpoint, a Hugging Face hub name or a local folder. "
            "llm.init=random needs none."
        )
    return llm.checkpoint


def _not_at_hand(llm: LLMConfig, error: Exception) -> ValueError:
    name = llm.checkpoint
    return ValueError(
        f"llm={llm.name}: the weights of {name} are not at hand ({str(error).splitlines()[0]}). They come from the "
        f"Hugging Face hub under that name: connect once (`hf download {name}`), or point llm.checkpoint at a local "
        "folder. llm.init=random builds the same architecture from the values in conf, with random weights."
    )


def checkpoint_config(llm: LLMConfig, start: str | Path | None = None) -> PreTrainedConfig:
    """The checkpoint's own configuration, or that of the LLM in the folder ``start``, in full; conf's values must agree
    with it.
    """
    try:
        if start is None:
            config = AutoConfig.from_pretrained(_named(llm))
        else:
            config = DeepStackConfig.from_pretrained(start).text_config
    except OSError as error:
        if start is not None:
            raise ValueError(f"init_from={start}: its config.json cannot be read. Is the folder there?") from error
        raise _not_at_hand(llm, error) from error
    own, theirs = text_config(llm).to_dict(), config.to_dict()
    named = sorted((llm.architecture.keys() - OLDER - _OF_THE_TEXT) | (set(OLDER.values()) & own.keys()))
    differ = {key: (own[key], theirs.get(key)) for key in named if key in own and own[key] != theirs.get(key)}
    if config.model_type != llm.family or differ:
        raise ValueError(
            f"llm={llm.name}: conf and the checkpoint {start or llm.checkpoint} disagree (conf, checkpoint): "
            f"{differ or (llm.family, config.model_type)}. Plans are checked against conf: correct llm.architecture."
        )
    return config


def _checkpoint(llm: LLMConfig) -> nn.Module:
    """The checkpoint's model, whole: transformers would draw missing tensors anew and go on."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(_named(llm), dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise _not_at_hand(llm, error) from error
    model, info = loaded
    wrong = {key: sorted(map(str, info[key]))[:3] for key in ("missing_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(
            f"llm={llm.name}: the checkpoint {llm.checkpoint} is not whole: {wrong}. Fetch it again, or name another."
        )
    return model
