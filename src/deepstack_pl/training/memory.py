"""What one training step needs in memory on one device, found by taking the step with shapes alone.

Term by term, for ``p`` parameters of ``s`` bytes each, ``q`` of them trained:

* weights: ``p s``, in the dtype that the precision holds them in (4 bytes, or 2 where it ends in -true and begins 16).
* gradients: ``q s``; between the micro-batches of a step they stay.
* AdamW: ``2 q s``, two running means in the weights' own dtype; while it steps ``q s`` more, for a square root.
* all else: no formula for each architecture. The real forward and backward run on fake tensors, which have shape and
  dtype but no bytes, and every storage is counted from its making to its end, by the part that made it. So activations
  under the attention that was chosen, half-precision copies of the weights under autocast, adapters, what frozen parts
  need not keep, logits and loss are what they are, for any LLM, tower and plan.

The worst moment is that of the forward and backward, or that of AdamW's step, when the activations are gone.
Not in it: what a GPU's driver and libraries take and what lies idle between blocks (see `ALLOWANCE`), evaluation, and
the losses by source that are read now and then for the log.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

LOSS, BACKWARD = "logits and loss", "backward"  # where storages are made, besides the parts
ALLOWANCE = 2**30  # bytes of a GPU that no tensor has: context, kernels' workspaces, gaps between blocks

_MASKLESS = ("flash_attention_2", "flex_attention")
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
    """Bytes of one optimiser step, by part of the model.

    Attributes:
        weights: of all parameters.
        gradients: of the trained ones. They stay from one micro-batch to the next.
        optimiser: AdamW's two states of each trained parameter, in the parameter's own dtype.
        peak: what else lives at the worst moment of forward and backward, by where it was made; what is of a part was
            made in its forward, nearly all of it kept for the backward.
        update: what AdamW's step needs for a moment, when all of ``peak`` is gone.
    """

    weights: dict[str, int]
    gradients: dict[str, int]
    optimiser: dict[str, int]
    peak: dict[str, int]
    update: int

    @property
    def total(self) -> int:
        """At the worst moment of a step, the tensors alone."""
        held = sum(self.weights.values()) + sum(self.gradients.values()) + sum(self.optimiser.values())
        return held + max(sum(self.peak.values()), self.update)


class Unpredictable(ValueError):
    """This step cannot be taken with shapes alone; the sentence says why."""


def predict(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch, precision: str, *, gpu: bool
) -> StepMemory:
    """What a step takes on a GPU, or on the CPU, whose micro-batches are like ``batch``.

    ``model``, on the meta device and frozen as the stage says, is used up.

    Raises:
        Unpredictable: another precision than those known here, or a module whose way depends on values.
    """
    if precision not in _PRECISIONS:
        raise Unpredictable(f"not known for trainer.precision={precision}, only for {', '.join(_PRECISIONS)}.")
    dtype, autocast = _PRECISIONS[precision]
    masked = _masked(model, *batch.input_ids.shape)
    nn.Module.to(model, dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _bring(model)
            for parameter in model.parameters():  # as in every micro-batch of a step but the first
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            inputs = {name: torch.empty_like(given) for name, given in batch.model_inputs().items()}
            with _Kernels(gpu, masked):
                peak = measure(model.train(), inputs, autocast)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise Unpredictable(f"a module's way depends on values ({type(error).__name__}: {error}).") from error
    trained = {part: _bytes([p for _, p in named if p.requires_grad]) for part, named in parts(model).items()}
    return StepMemory(
        weights={part: _bytes([p for _, p in named]) for part, named in parts(model).items()},
        gradients=trained,
        optimiser={part: 2 * size for part, size in trained.items()},
        peak=peak,
        update=sum(trained.values()),
    )


def measure(
    model: DeepStackForConditionalGeneration, inputs: dict[str, Tensor], autocast: torch.dtype | None
) -> dict[str, int]:
    """Bytes by where they were made, at the worst moment of one forward and backward. Also of real tensors."""
    meter = _Meter()
    with meter.watch(model), meter:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs, use_cache=False).loss
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
        modules = {model.vision_tower: "vision", model.projector: "projector", model.language_model: "llm"}
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
        self.places[-1] = LOSS

    def _leave(self, *_: Any) -> None:
        self.places.pop()


class _Kernels(TorchFunctionMode):
    """What runs on the device meant, where that changes the number of bytes: attention, and autocast's layer norm.

    Fake tensors of a GPU that is not there cannot run backward; those of the CPU can. ``masked``: whether attention is
    given a mask; it is made in any case, because of fake tensors nobody knows that it holds nothing but ones.
    """

    def __init__(self, gpu: bool, masked: bool) -> None:
        super().__init__()
        self.gpu, self.masked = gpu, masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if not self.masked and kwargs.get("attn_mask") is not None:
                kwargs = {**kwargs, "attn_mask": None, "is_causal": True}
            return (_fused if self.gpu else func)(*args, **kwargs)
        if func is F.layer_norm and self.gpu and torch.is_autocast_enabled("cpu"):
            return func(*tree_map_only(Tensor, Tensor.float, args), **tree_map_only(Tensor, Tensor.float, kwargs))
        return func(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The memory-efficient kernel keeps its arguments, its result and a number for each query; so does flash.

    A mask is made into numbers for every layer anew, and kept.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


def _masked(model: DeepStackForConditionalGeneration, rows: int, length: int) -> bool:
    """Whether attention takes a mask: not of one row, which nothing pads, unless it is longer than a sliding window;
    and not where the kernel is told lengths or blocks instead. That kernel need not be installed here.
    """
    llm = model.language_model
    if llm.config._attn_implementation in _MASKLESS:
        llm.set_attn_implementation("sdpa")
        return False
    window = llm.config.to_dict().get("sliding_window")
    return rows > 1 or (window is not None and length >= window)


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


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
