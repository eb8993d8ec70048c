"""config.json: every value the model and its processor need, so that loading needs no conf/ and no remote code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from deepstack_pl.language.config import TooLong
from deepstack_pl.multimodal.config import LoRAConfig, ProjectorKind, Sharing
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig, VisionInit, VisionLibrary


class DeepStackConfig(PreTrainedConfig):
    """Hugging Face configuration of `DeepStackForConditionalGeneration`.

    Attributes:
        text_config: the LLM's own Hugging Face configuration.
        vision: the values of a `VisionConfig`.
        projector: a `ProjectorKind`.
        projector_sharing: a `Sharing`.
        plan: the values of a `Plan`.
        template: name of the conversation template.
        image_token_id: the placeholder's id; its embedding is never looked up, so it may lie beyond the vocabulary.
        sample_max_length: positions of a sample, image tokens included.
        sample_too_long: a `TooLong`.
        init_seed: the seed that each part's random weights were drawn from.
        lora: by the name of a part (vision, llm) the values of the `LoRAConfig` whose adapters it holds.
        published: the config.json of the published checkpoint that this model was converted from, whole.
    """

    model_type = "deepstack_pl"
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore # noqa: RUF012 - Hugging Face reads it on the class

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        projector: str = ProjectorKind.mlp2x_gelu.value,
        projector_sharing: str = Sharing.shared.value,
        plan: dict[str, Any] | None = None,
        template: str = "shipped",
        image_token_id: int = -1,
        sample_max_length: int = 2048,
        sample_too_long: str = TooLong.refuse.value,
        init_seed: int = 0,
        lora: dict[str, dict[str, Any]] | None = None,
        published: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = _text_config(text_config)
        self.text_config = text_config if text_config is not None else CONFIG_MAPPING["llama"]()
        self.vision = vision or {}
        self.projector = projector
        self.projector_sharing = projector_sharing
        self.plan = plan or {}
        self.template = template
        self.image_token_id = image_token_id
        self.sample_max_length = sample_max_length
        self.sample_too_long = sample_too_long
        self.init_seed = init_seed
        self.lora = lora or {}
        self.published = published
        # Written at both levels: the default of the nested one changed between transformers releases.
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)

    def typed_plan(self) -> Plan:
        with _of("plan"):
            return Plan.from_dict(self.plan)

    def typed_lora(self) -> dict[str, LoRAConfig]:
        with _of("lora"):
            return {part: LoRAConfig(**values) for part, values in self.lora.items()}

    def typed_vision(self) -> VisionConfig:
        with _of("vision"):
            library = self.vision.get("library", VisionLibrary.open_clip.value)  # the only one that older folders had
            enums = {"init": VisionInit(self.vision["init"]), "library": VisionLibrary(library)}
            return VisionConfig(**{**self.vision, **enums})


def _text_config(values: dict[str, Any]) -> PreTrainedConfig:
    kind = values.get("model_type")
    if kind not in list(CONFIG_MAPPING):
        raise ValueError(
            f"config.json: text_config.model_type={kind!r}: transformers {transformers.__version__} has no such "
            "language model. Install a newer transformers, or correct config.json."
        )
    try:
        config = CONFIG_MAPPING[kind](**values)
        if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
            raise TypeError(f"dtype={config.dtype!r}")
        return config
    except (StrictDataclassError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: transformers refuses its text_config: {reason}") from error


@contextmanager
def _of(key: str) -> Iterator[None]:
    """Turns what a value of another kind than ours leads to into a sentence."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"config.json: its {key} is none that this version of deepstack_pl writes ({type(error).__name__}: "
            f"{error}). Export the model again, or restore the file."
        ) from error


def vision_values(config: VisionConfig) -> dict[str, Any]:
    """Plain values of a `VisionConfig`, for config.json."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(config).items()}
