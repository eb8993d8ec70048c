"""What sharing out the weights (FSDP2) changes in a step's memory: see `memory`.

A *unit* is what is gathered and let go together (`sharding.units`), and last the rest of the model, its root. Read in
torch's ``_fully_shard`` and held to a real step of two processes on the CPU (`tests/cli/test_memory_shares.py`):

* a share is the first dimension's, rounded up; weights, gradients and AdamW's states lie in shares.
* the root is gathered for the whole step, its gradients whole until the backward pass ends.
* of the units there is one gathered, and beside it the buffer that brings the next: in the dtype of computing.
* a unit's gradients are whole until its last one is there; then they are copied into a buffer of float32, to be summed
  over the processes, which stays until the next unit's takes its place.
"""

from functools import partial

import torch
from torch import Tensor, nn

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.sharding import units


def units_of(model: DeepStackForConditionalGeneration) -> list[list[nn.Parameter]]:
    """The parameters of each unit, the root's last."""
    seen: set[int] = set()
    found = []
    for module in (*units(model), model):
        found.append([parameter for parameter in module.parameters() if id(parameter) not in seen])
        seen |= {id(parameter) for parameter in found[-1]}
    return found


def share(parameter: Tensor, shares: int, dtype: torch.dtype) -> int:
    """Bytes of the largest of ``shares`` shares."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return -(-rows // shares) * (parameter.numel() // max(1, rows)) * dtype.itemsize


def gathered(units: list[list[nn.Parameter]]) -> int:
    """Bytes of the root and of the two largest units beside it, as they are computed with."""
    *inner, root = [sum(p.numel() * p.element_size() for p in unit) for unit in units]
    return root + sum(sorted(inner)[-2:])


def let_go(units: list[list[nn.Parameter]]) -> None:
    """Have the gradients of ``units`` come and go as FSDP2 lets them, from now on."""
    buffer: list[Tensor] = []
    for unit in units:
        trained = [parameter for parameter in unit if parameter.requires_grad]
        hook = partial(_arrived, trained, set[int](), buffer)
        for parameter in trained:
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(hook)


def _arrived(trained: list[nn.Parameter], there: set[int], buffer: list[Tensor], parameter: Tensor) -> None:
    there.add(id(parameter))
    if len(there) < len(trained):
        return
    there.clear()
    buffer.clear()
    buffer.append(torch.empty(sum(p.numel() for p in trained), dtype=torch.float32))
    for each in trained:
        each.grad = None
