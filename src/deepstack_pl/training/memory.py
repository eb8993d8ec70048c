"""What one training step needs in memory on each device, found by taking the step with shapes alone.

Term by term, on one device, for ``p`` parameters of ``s`` bytes each, ``q`` of them trained:

* weights: ``p s``, in the dtype that the precision holds them in (4 bytes, or 2 where it ends in -true and begins 16).
* gradients: ``q s``; between the micro-batches of a step they stay.
* AdamW: ``2 q s``, two running means in the weights' own dtype; while it steps ``q s`` more, for a square root, unless
  its kernel is the fused one (on a GPU, without a loss scaler).
* all else: no formula for each architecture. The real forward and backward run on fake tensors, which have shape and
  dtype but no bytes, and every storage is counted from its making to its end, by the part that made it. So activations
  under the attention that was chosen, half-precision copies of the weights under autocast, adapters, what frozen parts
  need not keep, logits and loss are what they are, for any LLM, tower and plan.

With strategy=ddp each device holds all that; gradients lie in the buckets that are sent. Where weights are shared out,
`memory_shares` says what changes. Activations that are computed again (strategy.checkpointing) are so here too.

The worst moment is that of the forward and backward, or that of AdamW's step, when the activations are gone.
Not in it: what a GPU's driver and libraries take and what lies idle between blocks (see `ALLOWANCE`), and evaluation.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.config import Spread, StrategyConfig
from deepstack_pl.training.memory_kernels import Kernels, takes_mask
from deepstack_pl.training.memory_shares import gathered, let_go, share, units_of
from deepstack_pl.training.sharding import PRECISIONS, checkpoint_activations, shares_weights

LOSS, BACKWARD = "logits and loss", "backward"  # where storages are made, besides the parts
ALLOWANCE = 2**30  # bytes of a GPU that no tensor has: context, kernels' workspaces, gaps between blocks

_ALONE = StrategyConfig(name="single")
# trainer.precision: the dtype of the weights, and that of autocast.
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "32": (torch.float32, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-true": (torch.float16, None),
    "bf16-true": (torch.bfloat16, None),
}


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one optimiser step on one device, by part of the model.

    Attributes:
        weights: of all parameters.
        gradients: of the trained ones. They stay from one micro-batch to the next.
        optimiser: AdamW's two states of each trained parameter, in the parameter's own dtype.
        peak: what else lives at the worst moment of forward and backward, by where it was made; what is of a part was
            made in its forward, nearly all of it kept for the backward.
        update: what AdamW's step needs for a moment, or ddp to sort its buckets anew, when all of ``peak`` is gone.
        gathered: weights of other devices' shares that are here at that worst moment.
    """

    weights: dict[str, int]
    gradients: dict[str, int]
    optimiser: dict[str, int]
    peak: dict[str, int]
    update: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """At the worst moment of a step, the tensors alone."""
        held = sum(self.weights.values()) + sum(self.gradients.values()) + sum(self.optimiser.values())
        return held + max(sum(self.peak.values()) + self.gathered, self.update)


class Unpredictable(ValueError):
    """This step cannot be taken with shapes alone; the sentence says why."""


def predict(
    model: DeepStackForConditionalGeneration,
    batch: MultimodalBatch,
    precision: str,
    *,
    gpu: bool,
    strategy: StrategyConfig = _ALONE,
    shares: int = 1,
) -> StepMemory:
    """What a step takes on a GPU, or on the CPU, whose micro-batches are like ``batch``, and which holds one of
    ``shares`` shares of the weights where ``strategy`` shares them out.

    ``model``, on the meta device and frozen as the stage says, is used up.

    Raises:
        Unpredictable: another precision than those known here, or a module whose way depends on values.
    """
    sharded = shares_weights(strategy)
    known = PRECISIONS if sharded else _PRECISIONS
    if precision not in known:
        raise Unpredictable(f"not known for trainer.precision={precision}, only for {', '.join(known)}.")
    dtype, autocast = _PRECISIONS[precision]
    held = dtype
    if sharded:
        (held, dtype), autocast = PRECISIONS[precision], None
    kernels = Kernels(gpu, takes_mask(model, *batch.input_ids.shape, packed=batch.packed))
    for block in model.blocks():
        block.forward = kernels.during(block.forward)
    checkpoint_activations(model, strategy.checkpointing)
    nn.Module.to(model, dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _bring(model)
            units = units_of(model) if sharded else []
            for parameter in model.parameters():  # as in every micro-batch of a step but the first
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            let_go(units)
            given = batch.training_inputs() | {"attention_mask": batch.attention_mask}
            inputs = {k: torch.empty_like(v) if isinstance(v, Tensor) else v for k, v in given.items()}
            with kernels:
                peak = measure(model.train(), inputs, autocast)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise Unpredictable(f"a module's way depends on values ({type(error).__name__}: {error}).") from error
    each = {part: [(p.requires_grad, share(p, shares, held)) for _, p in named] for part, named in parts(model).items()}
    trained = {part: sum(size for learns, size in sizes if learns) for part, sizes in each.items()}
    fused = gpu and precision != "16-mixed"
    return StepMemory(
        weights={part: sum(size for _, size in sizes) for part, sizes in each.items()},
        gradients=trained,
        optimiser={part: 2 * size for part, size in trained.items()},
        peak=peak,
        update=0 if fused and strategy.kind is not Spread.ddp else sum(trained.values()),
        gathered=gathered(units) if sharded else 0,
    )


def measure(
    model: DeepStackForConditionalGeneration, inputs: dict[str, Any], autocast: torch.dtype | None
) -> dict[str, int]:
    """Bytes by where they were made, at the worst moment of one forward and backward. Also of real tensors."""
    meter = _Meter()
    with meter.watch(model), meter:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs, use_cache=False).losses.sum()
        meter.places.append(BACKWARD)
        loss.backward()
    return dict(meter.peak)


class _Meter(TorchDispatchMode):
    """Counts storages that are made while it is on, by place, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.places = ["projector"]
        self.alive, self.peak, self.total = Counter[str](), Counter[str](), 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._known:  # else a view, or in place
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        place, size, key = self.places[-1], storage.nbytes(), storage._cdata
        self._known.add(key)
        self.alive[place] += size
        self.total += size
        weakref.finalize(storage, self._died, place, size, key)
        if self.total > sum(self.peak.values()):
            self.peak = Counter(self.alive)

    def _died(self, place: str, size: int, key: int) -> None:
        self._known.discard(key)
        self.alive[place] -= size
        self.total -= size

    @contextmanager
    def watch(self, model: DeepStackForConditionalGeneration) -> Iterator[None]:
        """Know which part runs; from the LLM's head on, it is the logits and the loss."""
        modules = {model.vision_tower: "vision", model.projector: "projector", model.get_decoder(): "llm"}
        modules |= dict.fromkeys(model.own_projectors.values(), "projector")
        hooks = [model.get_output_embeddings().register_forward_pre_hook(self._enter_loss)]
        for module, part in modules.items():
            if module is not None:
                hooks += [
                    module.register_forward_pre_hook(lambda *_, part=part: self.places.append(part)),
                    module.register_forward_hook(self._leave),
                ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter_loss(self, *_: Any) -> None:
        if self.places[-1] != BACKWARD:  # where chunks of logits are made again
            self.places[-1] = LOSS

    def _leave(self, *_: Any) -> None:
        self.places.pop()


def _bring(model: nn.Module) -> None:
    """From meta into the fake mode; parameters that are one stay one."""
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    model.to_empty(device="cpu")
    for first, *others in named.values():
        for name in others:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
