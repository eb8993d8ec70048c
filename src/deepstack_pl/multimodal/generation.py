"""How ``generate`` feeds a prompt with images: encoded once, and given to whatever part of the prompt runs.

Axes: ``b t`` positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationMixin

from deepstack_pl.multimodal.output import CACHE

# What `encode` takes. None of it is indexed by sample: beams must not repeat it, and do not repeat what it gives.
_VISUAL = ("views", "vit_rows", "sequence_rows", "group_rows")


class DeepStackGenerationMixin(GenerationMixin):
    """Every mode of ``generate``: sampling, beams, static caches, a prompt in chunks, either padding side."""

    # GenerationMixin types `self` as a protocol that its own subclasses do not meet; hence the ignores below.
    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Int[Tensor, "b t"] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`GenerationMixin.generate`, where the tower runs once however the prompt is cut, repeated or not cached.

        Rows that are padded on the right are moved to the left first, as are the prompts in what is returned: the next
        token would be read off the padding.

        Raises:
            ValueError: prompt lookup, where the placeholder of an image is beyond the vocabulary.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("views") is not None and kwargs.get("prompt_lookup_num_tokens"):
            self._refuse_lookup()
        kwargs |= _padded_left(kwargs)
        if kwargs.get("views") is not None:
            visual = {name: kwargs.pop(name) for name in _VISUAL}
            kwargs["encoded"] = self.encode(**visual)  # pyright: ignore[reportAttributeAccessIssue]
        return super().generate(None, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_lookup(self) -> None:
        size = self.get_input_embeddings().num_embeddings  # pyright: ignore[reportAttributeAccessIssue]
        if self.config.image_token_id >= size:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"prompt_lookup_num_tokens: transformers looks each guess up in a vocabulary of {size} tokens, and the "
                "placeholder of an image is beyond it. Leave it out for prompts with images."
            )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Images belong to the prompt: they go along while positions of it run, in chunks or (uncached) all of them.

        The index says which slot stands at each position of the prompt; it is cut to the positions that run now, and
        generated ones have none. Where they stand is read off the cache: before 5.23, transformers calls only a
        prompt's first chunk the first iteration.
        """
        cache = past_key_values if cache is None else cache  # both names are transformers', by its release
        kwargs[CACHE] = cache
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        index = inputs.pop("token_index", None)
        encoded = inputs.pop("encoded", None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if index is None or past >= index.shape[1]:
            return inputs
        stop = past + inputs["input_ids"].shape[1]
        longer = F.pad(index, (0, max(0, stop - index.shape[1])), value=-1)
        return {**inputs, "token_index": longer[:, past:stop], "encoded": encoded}


def _padded_left(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``inputs`` that stand by position, each row's padding moved before its text.

    Nothing where no row is padded on the right, nor where a cache holds positions already.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or inputs.get(CACHE) is not None:
        return {}
    if not (mask[:, 1:].long() < mask[:, :-1].long()).any():
        return {}
    order = mask.long().argsort(dim=1, stable=True)
    names = ("input_ids", "attention_mask", "token_index", "position_ids")
    return {name: inputs[name].gather(1, order) for name in names if inputs.get(name) is not None}
