"""What the model's forward pass returns. Axes: ``l`` learned tokens."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from deepstack_pl.stacking.injection import InjectionTrace

# What transformers calls a cache, in arguments and here: the second before 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


@dataclass
class DeepStackOutput(CausalLMOutputWithPast):
    """What a forward pass returns: ``losses`` of single tokens, or logits; ``record`` only where it was asked for."""

    losses: Float[Tensor, " l"] | None = None
    record: list[InjectionTrace] | None = None
