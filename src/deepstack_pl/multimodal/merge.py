"""Visual tokens into the text sequence: one index, built once, by the processor.

Axes: ``b t`` positions, ``n`` slots, ``d`` width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepstack_pl.stacking.injection import gather


def merge(
    embed: nn.Module, input_ids: Int[Tensor, "b t"], visual: Float[Tensor, "n d"], token_index: Int[Tensor, "b t"]
) -> Float[Tensor, "b t d"]:
    """Text embeddings, with visual tokens at the positions that ``token_index`` gives a slot.

    The placeholder's own id is never looked up, so that it may lie beyond the embedding table.
    """
    is_visual = token_index >= 0
    text = embed(input_ids.masked_fill(is_visual, 0))
    return torch.where(is_visual.unsqueeze(-1), gather(visual, token_index).to(text.dtype), text)
