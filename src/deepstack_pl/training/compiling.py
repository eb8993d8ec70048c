"""``compile=true``: the blocks' forward passes as compiled code, in training alone.

Blocks, and not the model: all blocks of a kind share one graph, what differs between batches (views, images, learned
tokens) stays outside, and the hooks that inject run before each layer as they always do. Without gradients, in
generation above all, blocks run as written: shapes change with every token there.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration


def compile_blocks(model: DeepStackForConditionalGeneration, backend: str = "inductor") -> None:
    """Compile each block at its first step; once, after `checkpoint_activations` and before weights are shared out."""
    for block in model.blocks():
        block.forward = _in_training(block.forward, torch.compile(block.forward, backend=backend))


def _in_training(written: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else written)(*args, **kwargs)

    return run
