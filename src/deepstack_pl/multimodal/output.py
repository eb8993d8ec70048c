"""What the model's forward pass returns. Axes: ``l`` learned tokens."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.utils.generic import ModelOutput

from deepstack_pl.stacking.injection import InjectionTrace


@dataclass
class DeepStackOutput(ModelOutput):
    """What a forward pass returns: ``losses`` of single tokens, or logits; ``record`` only where it was asked for."""

    loss: Tensor | None = None
    losses: Float[Tensor, " l"] | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    record: list[InjectionTrace] | None = None
