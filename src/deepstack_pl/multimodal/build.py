"""From values to a model: random, pretrained or on the meta device; and its parts by name."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from deepstack_pl.language.config import LLMConfig, LLMInit
from deepstack_pl.multimodal.config import LoRAConfig, ProjectorConfig, build_plan
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.vision.config import VisionConfig, VisionInit

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
    built.loss = llm.loss
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
    except UnpicklingError as error:
        raise ValueError(
            f"llm={llm.name}: a .bin of {llm.checkpoint} is damaged or holds more than tensors, and nothing of it was "
            "run. Fetch it again, or take a version with safetensors."
        ) from error
    model, info = loaded
    wrong = {key: sorted(map(str, info[key]))[:3] for key in ("missing_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(
            f"llm={llm.name}: the checkpoint {llm.checkpoint} is not whole: {wrong}. Fetch it again, or name another."
        )
    return model
