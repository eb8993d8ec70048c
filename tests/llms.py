"""The LLMs of conf/llm, and one that has no option there: a new family is a page of values."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from deepstack_pl.language.config import LLMConfig, LLMInit, Size

OPTIONS = Path(__file__).parents[1] / "conf" / "llm"
NAMES = sorted(file.stem for file in OPTIONS.glob("*.yaml") if file.stem != "tiny")
GRANITE = {  # Granite 3.1's multipliers, at a size that is shrunk further
    "num_hidden_layers": 40,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49155,
    "max_position_embeddings": 131072,
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1.0e-5,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def option(name: str, folder: Path = OPTIONS) -> LLMConfig:
    """``llm=name llm.init=random``."""
    if name == "granite":
        return LLMConfig(name="granite", family="granite", architecture=dict(GRANITE))
    values: Any = OmegaConf.load(folder / f"{name}.yaml")
    values.init = "random"
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LLMConfig), values))
    assert isinstance(made, LLMConfig)
    assert made.init is LLMInit.random
    return made


def twin(name: str, layers: int = 12) -> LLMConfig:
    """``llm=name llm.init=random llm.size=tiny llm.architecture.num_hidden_layers=layers``."""
    llm = option(name)
    llm.size = Size.tiny
    llm.architecture["num_hidden_layers"] = layers
    return llm
