"""The kernels of the device that is meant, where they keep other bytes than the CPU's: see `memory`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

_MASKLESS = ("flash_attention_2", "flex_attention", "varlen")


class Kernels(TorchFunctionMode):
    """What runs on the device meant, where that changes the number of bytes: attention, and autocast's layer norm.

    Fake tensors of a GPU that is not there cannot run backward; those of the CPU can. ``masked``: whether attention is
    given a mask; it is made in any case, because of fake tensors nobody knows that it holds nothing but ones.
    """

    def __init__(self, gpu: bool, masked: bool) -> None:
        super().__init__()
        self.gpu, self.masked = gpu, masked

    def during(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` with this mode on, also where the backward pass, which puts modes aside, calls it again."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return run

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


def takes_mask(model: DeepStackForConditionalGeneration, rows: int, length: int, *, packed: bool) -> bool:
    """Whether attention takes a mask: not of one row, which nothing pads, unless it is longer than a sliding window
    or holds several samples; and not where the kernel is told lengths or blocks instead. That kernel need not be
    installed here.
    """
    llm = model.language_model
    if llm.config._attn_implementation in _MASKLESS:
        llm.set_attn_implementation("sdpa")
        return False
    window = llm.config.to_dict().get("sliding_window")
    return rows > 1 or packed or (window is not None and length >= window)
