"""Low-rank adapters (LoRA) beside the linear layers of a host's blocks: put in for good, named, merged away.

peft puts them in place, layer by layer: the hosts keep their classes, their hooks and the order of what they compute.
"""

from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from deepstack_pl.multimodal.config import LoRAConfig

_ADAPTER, _BASE = ".lora_", ".base_layer."  # in the names of parameters, as peft writes them


def add_adapters(part: str, host: nn.Module, blocks: Sequence[nn.Module], values: LoRAConfig) -> None:
    """Put adapters beside the linear layers of ``blocks``, which are ``host``'s; what they add is zero at first.

    Raises:
        ValueError: a target names no such layer.
    """
    config = LoraConfig(
        r=values.rank,
        lora_alpha=values.alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=values.dropout,
        target_modules=_chosen(part, _linear_layers(host, blocks), values.targets),
    )
    inject_adapter_in_model(config, host)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's."""
    return _ADAPTER in name


def without_adapters(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(_BASE, ".")


def merge_adapters(model: nn.Module) -> int:
    """Add each adapter to the weights that it stands beside, and take it out; returns how many there were."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, adapted in found:
        adapted.merge(safe_merge=True)
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, adapted.get_base_layer())
    return len(found)


def _linear_layers(host: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """The names within ``host`` of the linear layers that ``blocks`` call.

    `nn.MultiheadAttention` computes with its layers' weights and never calls them: an adapter there would be idle.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    idle = {id(child) for m in host.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    return [n for n, m in host.named_modules() if isinstance(m, nn.Linear) and id(m) in inside - idle]


def _chosen(part: str, layers: list[str], targets: list[str]) -> list[str]:
    """The layers that ``targets`` name; all where it names none."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
    if not layers:
        raise ValueError(
            f"stage.{part}.lora.rank: no block of the {part} part that the plan reaches has a linear layer to adapt. "
            f"Say stage.{part}.lora.rank=0."
        )
    for target in targets:
        if not any(_ends(name, target) for name in layers):
            raise ValueError(
                f"stage.{part}.lora.targets: {target!r} names no linear layer of the {part} part's blocks. There are "
                f"{kinds}; an empty list takes all of them."
            )
    return [name for name in layers if not targets or any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
