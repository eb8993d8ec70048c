"""What is put on a model from outside: shares of its weights (FSDP2), and activations that are computed again.

The model names its parts and knows one device. Each part is a unit: its weights are gathered before it runs and let go
after it; what is in none (embedding, head, gates) is gathered for the whole step.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # which makes the operator that `_KEPT` names
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.processes import from_first, rank, world
from deepstack_pl.training.config import Checkpointing, Spread, StrategyConfig

# trainer.precision where weights are shared out: the dtype of weights and AdamW's states, and the one to compute in.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "32-true": (torch.float32, torch.float32),
    "32": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
}
_aten = torch.ops.aten
_KEPT = [  # by checkpointing=selective: what is dear to compute again
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    # llm.attention=varlen on a GPU; an operator of torch's own that it does not promise under this name
    *([torch.ops.torch_attn._varlen_attn.default] if hasattr(torch.ops.torch_attn, "_varlen_attn") else []),
]


def shares_weights(config: StrategyConfig) -> bool:
    """Whether each process holds a share of the weights alone."""
    return config.kind in (Spread.fsdp, Spread.fsdp_hybrid)


def checkpoint_activations(model: DeepStackForConditionalGeneration, how: Checkpointing) -> None:
    """Have the blocks of ``model`` compute activations again in the backward pass; once, for good. An injection into
    the LLM comes before its layer and is not repeated.
    """
    if how is Checkpointing.none:
        return
    context = {} if how is Checkpointing.full else {"context_fn": partial(create_selective_checkpoint_contexts, _KEPT)}
    for block in model.blocks():
        block.forward = _again(block, block.forward, context)


def units(model: DeepStackForConditionalGeneration) -> list[nn.Module]:
    """What is gathered and let go together, inner ones first; the rest of the model is the last unit."""
    projectors = [p for p in (model.projector, *model.own_projectors.values()) if p is not None]
    return [*model.blocks(), model.vision_tower, *projectors]


def shard(
    model: DeepStackForConditionalGeneration, config: StrategyConfig, precision: str, device: torch.device
) -> None:
    """Share out the weights that process 0 holds on its CPU; those of the others may be on meta. Gradients are summed
    in float32, whatever is computed in.

    All processes must call it.
    """
    held, computed = PRECISIONS[precision]
    weights = model.state_dict() if rank() == 0 else {}
    weights = {name: value.to(held) if value.is_floating_point() else value for name, value in weights.items()}
    buffers = from_first({name: buffer.cpu() for name, buffer in model.named_buffers()} if rank() == 0 else {})
    shared = _shared(model)
    nn.Module.to(model, "meta")
    nn.Module.to(model, held)
    _tie(model, shared)
    mesh, policy = _mesh(config, device), MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    for unit in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    _tie(model.to_empty(device=device), shared)
    for name, buffer in buffers.items():
        module, own = _place(model, name)
        module._buffers[own] = buffer.to(device)
    lost = [f"{n}.{k}" for n, m in model.named_modules() for k, v in vars(m).items() if _is_meta(v)]
    assert not lost, f"tensors that are neither parameters nor buffers have no values: {lost}"
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)


def gathered(model: DeepStackForConditionalGeneration) -> dict[str, Any]:
    """All weights on the CPU of process 0; nothing on the others. All processes must call it."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        found = model.state_dict() if rank() == 0 else {}
    twice = {name for _, *others in _shared(model) for name in others}  # gathered, they are no longer one tensor
    return {name: tensor for name, tensor in found.items() if name not in twice}


def _again(block: nn.Module, forward: Callable[..., Any], context: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, **context)

    return run


def _mesh(config: StrategyConfig, device: torch.device) -> DeviceMesh:
    if config.kind is Spread.fsdp:
        return init_device_mesh(device.type, (world(),), mesh_dim_names=("share",))
    machines = world() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    replicas = replicas_of(config, world(), machines)
    return init_device_mesh(device.type, (replicas, world() // replicas), mesh_dim_names=("replica", "share"))


def replicas_of(config: StrategyConfig, processes: int, nodes: int = 1) -> int:
    """How often the whole model is there.

    Raises:
        ValueError: ``strategy.replicas`` does not divide the processes.
    """
    if config.kind is not Spread.fsdp_hybrid:
        return 1 if config.kind is Spread.fsdp else processes
    replicas = config.replicas or nodes
    if processes % replicas:
        raise ValueError(
            f"strategy.replicas={replicas} does not divide {processes} processes: every replica takes as many. Choose "
            "a divisor."
        )
    return replicas


def _shared(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, such as a tied head's and the embedding's."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _tie(model: nn.Module, shared: list[list[str]]) -> None:
    """Conversions make two of what was one."""
    for first, *others in shared:
        for name in others:
            module, own = _place(model, name)
            module._parameters[own] = model.get_parameter(first)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, own = name.rpartition(".")
    return model.get_submodule(module), own


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
