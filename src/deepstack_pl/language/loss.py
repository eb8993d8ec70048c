"""The loss of each token that is learned, without the logits of all others.

Axes: ``b t`` positions, ``l`` learned tokens, ``d`` width.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from deepstack_pl.batch import IGNORE_INDEX
from deepstack_pl.language.config import Loss

AT_ONCE = 2**24  # logits that are held together: 64 MiB in float32
# Tokens that are at least: the head's gradient is summed over chunks in its own dtype, where bfloat16 rounds each sum.
LEAST = 512  # a vocabulary of 32,000 has as many anyway


def token_losses(
    llm: PreTrainedModel,
    inputs: dict[str, Any],
    learned_at: Int[Tensor, " l"],
    targets: Int[Tensor, " l"],
    kind: Loss,
) -> Float[Tensor, " l"]:
    """The cross entropy of ``targets`` after the positions ``learned_at``, counted row after row, in float32; 0 where a
    target is -100.

    ``inputs`` are those of ``llm``. Of more logits than `AT_ONCE`, and more tokens than `LEAST`, some are made at a
    time, and anew in the backward.
    """
    if kind is Loss.full:
        return _cross_entropy(llm(**inputs).logits.flatten(0, 1)[learned_at], targets)
    hidden = llm.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)[learned_at]
    return losses_after(llm, hidden, targets)


def losses_after(llm: PreTrainedModel, hidden: Float[Tensor, "l d"], targets: Int[Tensor, " l"]) -> Float[Tensor, " l"]:
    """The same, given the decoder's output at those positions."""
    size = max(LEAST, AT_ONCE // int(llm.config.vocab_size))
    if len(hidden) <= size or not torch.is_grad_enabled():
        return torch.cat([_some(llm, *part) for part in _parts(hidden, targets, size)])
    again = partial(checkpoint, _some, llm, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn here
    return torch.cat([again(*part) for part in _parts(hidden, targets, size)])


def _parts(
    hidden: Float[Tensor, "l d"], targets: Int[Tensor, " l"], size: int
) -> list[tuple[Float[Tensor, "_ d"], Int[Tensor, " _"]]]:
    return list(zip(hidden.split(size), targets.split(size), strict=True))


def _some(llm: PreTrainedModel, hidden: Float[Tensor, "l d"], targets: Int[Tensor, " l"]) -> Float[Tensor, " l"]:
    return _cross_entropy(logits_of(llm, hidden), targets)


def _cross_entropy(logits: Float[Tensor, "l v"], targets: Int[Tensor, " l"]) -> Float[Tensor, " l"]:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


def logits_of(llm: PreTrainedModel, hidden: Float[Tensor, "l d"]) -> Float[Tensor, "l v"]:
    """What ``llm`` makes of its decoder's output, by its own code: some scale logits, some cap them."""
    return type(llm).forward(_AfterDecoder(llm, hidden), inputs_embeds=hidden[None], use_cache=False).logits[0]


class _AfterDecoder:
    """An LLM whose decoder has run already: what its ``forward`` takes for itself."""

    def __init__(self, llm: PreTrainedModel, hidden: Float[Tensor, "l d"]) -> None:
        def decoded(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=hidden[None])  # pyright: ignore[reportArgumentType]

        self._llm, decoder = llm, llm.get_decoder()
        (name,) = (name for name, module in llm.named_children() if module is decoder)
        setattr(self, name, decoded)  # no method: a cycle would keep the hidden states until Python looks for cycles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
