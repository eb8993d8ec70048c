"""Which language model hosts, and how text is written for it. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deepstack_pl.language.tiny import shrink


class LLMInit(Enum):
    """Where a language model's weights come from."""

    random = "random"  # the architecture below, drawn anew
    pretrained = "pretrained"  # the checkpoint


class Size(Enum):
    """Which of a family is built."""

    full = "full"  # the architecture as written
    tiny = "tiny"  # its twin for a CPU, shrunk by rule (language.tiny), with random weights and the shipped tokenizer


class Attention(Enum):
    """Hugging Face attention implementation."""

    eager = "eager"
    sdpa = "sdpa"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"  # needs a GPU, half precision and the [flash] extra
    varlen = "varlen"  # training: torch's own kernel for samples side by side without padding; otherwise sdpa


class Loss(Enum):
    """How the loss of the learned tokens is computed. The numbers are the same."""

    chunked = "chunked"  # logits of the learned tokens alone, some at a time (language.loss), and anew in the backward
    full = "full"  # the LLM's whole forward, with logits at every position


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
    size: Size = Size.full
    template: str = "shipped"  # a name in language.template.TEMPLATES
    max_length: int = 2048  # positions, image tokens included
    too_long: TooLong = TooLong.cut_text
    attention: Attention = Attention.sdpa
    loss: Loss = Loss.chunked
    architecture: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size is Size.tiny and self.init is LLMInit.pretrained:
            raise ValueError(
                f"llm={self.name} llm.size=tiny: nobody trained the tiny twin, so there are no weights to load. Say "
                "llm.init=random, or llm.size=full."
            )

    @property
    def built(self) -> dict[str, Any]:
        """The architecture that is built, after ``size``."""
        return shrink(self.architecture) if self.size is Size.tiny else self.architecture

    @property
    def layers(self) -> int:
        """Decoder layers of what is built: plans are checked against them."""
        return int(self.built["num_hidden_layers"])
