"""What is put on a model from outside, where it can be seen without a second process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepstack_pl.language import varlen
from deepstack_pl.training.config import Checkpointing
from deepstack_pl.training.sharding import checkpoint_activations


class Operators(TorchDispatchMode):
    """Writes down what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


class Attending(nn.Module):
    """A block that is nothing but torch's kernel for segments."""

    def forward(self, states: Tensor) -> Tensor:
        return varlen._kernel(states, states, states, torch.empty(4, dtype=torch.int32), 5, None, None)


@pytest.mark.parametrize(("how", "times"), [(Checkpointing.full, 2), (Checkpointing.selective, 1)])
def test_selective_checkpointing_keeps_what_the_varlen_kernel_computed(how: Checkpointing, times: int) -> None:
    """By shapes alone, since the operator itself needs a GPU: only ``full`` computes it once more."""
    block, operators = Attending(), Operators()
    model: Any = SimpleNamespace(blocks=lambda: [block])
    checkpoint_activations(model, how)
    with FakeTensorMode(), operators:
        states = torch.randn(11, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        block(states).sum().backward()
    assert operators.ran.count("torch_attn._varlen_attn.default") == times
