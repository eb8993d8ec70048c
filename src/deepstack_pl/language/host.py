"""Any stock Hugging Face causal LM as a host, unmodified.

Hugging Face decoders hand unknown keyword arguments to every layer. A permanent, stateless pre-hook on each layer takes
ours out and injects; nothing is kept on a module between calls. A layer without the hook would swallow the argument in
silence, so that the hooks are asserted at build.
"""

from typing import Any, TypedDict

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepstack_pl.stacking.config import Dealt, Host
from deepstack_pl.stacking.injection import Traces, inject
from deepstack_pl.stacking.plan import Injection, Plan

CARRIER = "injection"


class Carrier(TypedDict):
    """What travels to the layers: the groups, where they go, and how strongly.

    Axes: ``g`` groups, ``n`` slots, ``b t`` positions, ``d`` width.
    """

    features: Float[Tensor, "g n d"]
    index: Int[Tensor, "b t"]
    scales: Float[Tensor, " gated"] | None
    traces: Traces | None


class InjectionHook:
    """Pre-hook of one decoder layer: takes the carrier out of the arguments and adds this layer's groups."""

    def __init__(self, injections: tuple[Injection, ...], groups: tuple[Dealt, ...], gated: tuple[Injection, ...]):
        self.places = [
            (injection, groups.index(injection.dealt), gated.index(injection) if injection in gated else None)
            for injection in injections
        ]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        carrier: Carrier | None = kwargs.pop(CARRIER, None)
        if carrier is None or not self.places:
            return args, kwargs
        hidden = args[0]
        for injection, group, gate in self.places:
            scale = carrier["scales"][gate] if gate is not None and carrier["scales"] is not None else None
            hidden = inject(hidden, carrier["features"][group], carrier["index"], injection, scale, carrier["traces"])
        return (hidden, *args[1:]), kwargs


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM.

    Raises:
        ValueError: its decoder keeps them somewhere unusual.
    """
    decoder = llm.get_decoder()
    layers = dict(decoder.named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(llm).__name__} cannot host injections: its decoder {type(decoder).__name__} has no ModuleList "
            "named `layers`. Choose a Llama-like causal LM."
        )
    return layers


def install(llm: PreTrainedModel, plan: Plan) -> None:
    """Put a hook on every decoder layer, once.

    Raises:
        ValueError: the model is not as deep as the plan was made for.
    """
    layers = decoder_layers(llm)
    if len(layers) != plan.llm_layers:
        raise ValueError(
            f"plan {plan.name} was made for an LLM of {plan.llm_layers} layers, but {type(llm).__name__} has "
            f"{len(layers)}. Set llm.architecture.num_hidden_layers to the model's own depth."
        )
    assert not any(_hooked(layer) for layer in layers), "hooks are installed once"
    at, groups, gated = plan.at(Host.llm), plan.groups(Host.llm), plan.gated(Host.llm)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(InjectionHook(at.get(number, ()), groups, gated), with_kwargs=True)
    assert_installed(llm)


def assert_installed(llm: PreTrainedModel) -> None:
    """Every layer holds exactly one hook; without it attention's ``**kwargs`` would swallow the groups."""
    assert all(_hooked(layer) == 1 for layer in decoder_layers(llm)), "a decoder layer lost its injection hook"


def _hooked(layer: nn.Module) -> int:
    return sum(isinstance(hook, InjectionHook) for hook in layer._forward_pre_hooks.values())
