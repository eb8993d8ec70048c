"""Which language model hosts, and how text is written for it. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class LLMInit(Enum):
    """Where a language model's weights come from."""

    random = "random"  # the architecture below, drawn anew
    pretrained = "pretrained"  # the checkpoint


class Attention(Enum):
    """Hugging Face attention implementation."""

    eager = "eager"
    sdpa = "sdpa"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


class TooLong(Enum):
    """What becomes of a training sample longer than ``max_length``. What is cut stands in the run's ledger."""

    cut_text = "cut_text"  # from the right; an image that does not fit goes whole, with what follows it
    refuse = "refuse"  # nothing of it is trained on: see data.max_refused
    cut = "cut"  # from the right, in the middle of an image too, as published


@dataclass(kw_only=True, slots=True)
class LLMConfig:
    """Any Hugging Face causal LM, unmodified. ``architecture`` holds its config's values, so that plans are checked
    and random or meta models built without a network."""

    name: str = "???"
    family: str = "???"  # Hugging Face model_type: llama, phi3, ...
    checkpoint: str | None = None  # hub name or local folder of the weights and tokenizer
    init: LLMInit = LLMInit.random
    template: str = "shipped"  # a name in language.conversation.TEMPLATES
    max_length: int = 2048  # positions, image tokens included
    too_long: TooLong = TooLong.cut_text
    attention: Attention = Attention.sdpa
    architecture: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return int(self.architecture["num_hidden_layers"])
