"""Attention within the segments of a row, and what tells each of Hugging Face's kernels where segments begin.

Positions that start anew with each segment are enough for kernels that are given a mask, which transformers makes of
them, but only where there is no other mask and no cache: with either, segments see each other in silence.

Axes: ``b t`` positions, ``h`` heads, ``k`` heads of keys and values, ``d`` width of a head.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deepstack_pl.language.config import Attention

# Kernels that are told where segments begin, and compute nothing between segments, nor for padding.
BY_BOUNDARIES = (Attention.varlen, Attention.flash_attention_2)


_TAKES = inspect.signature(varlen_attn).parameters


def segment_arguments(
    llm: PreTrainedModel, attention_mask: Tensor | None, boundaries: Int[Tensor, " ends"], longest: int
) -> dict[str, Any]:
    """The decoder's arguments for rows whose segments lie between ``boundaries``, the longest of so many positions.

    ``attention_mask`` is that of rows of one sample each; None where rows hold several.
    """
    kernel = llm.config._attn_implementation
    if kernel not in [each.value for each in BY_BOUNDARIES]:
        return {"attention_mask": attention_mask}
    begins = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    lengths = {"max_length_q": longest, "max_length_k": longest}
    # A mask of four axes is taken for finished; transformers would make one of all pairs of positions.
    none = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=boundaries.device)
    return {"attention_mask": none if kernel == Attention.varlen.value else None, **begins, **lengths}


def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k s d"],
    value: Float[Tensor, "b k s d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Int[Tensor, " ends"] | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h d"], None]:
    """Hugging Face's attention of the name ``varlen``: each segment by itself, with torch's own kernel on a GPU in half
    precision, elsewhere with one call a segment. Without segments, as in generation, it is ``sdpa``.

    Raises:
        ValueError: the model asks for what none of these kernels does.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(  # pyright: ignore[reportReturnType]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None, "the decoder made a mask of its own"
    assert not attention_mask.numel(), "the decoder made a mask of its own"
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"llm.attention=varlen does not know {name}, which this LLM has. Say llm.attention=eager.")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # which does not know this kernel
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not _has_kernel(query):
        return _each(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout), None  # pyright: ignore[reportCallIssue]
    if dropout:
        raise ValueError(
            f"llm.attention=varlen drops no attention out on a GPU, and llm.architecture asks for {dropout}. Say "
            "llm.attention=sdpa."
        )
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    joined = _kernel(flat[0], flat[1], flat[2], cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return joined.unflatten(0, (query.shape[0], query.shape[2])), None


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's own kernel computes this."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _kernel(
    query: Float[Tensor, "t h d"],
    key: Float[Tensor, "t k d"],
    value: Float[Tensor, "t k d"],
    boundaries: Int[Tensor, " ends"],
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "t h d"]:
    """torch's own, which has taken a scale and a window since 2.11, and shared heads since 2.12."""
    more: dict[str, Any] = {}
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and "enable_gqa" in _TAKES:
        more["enable_gqa"] = True
    elif shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    if "window_size" in _TAKES:
        more |= {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    elif sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"llm.attention=varlen: this LLM sees {sliding_window} positions back, which torch's kernel does from 2.11 "
            f"on, and this is torch {torch.__version__}. Say llm.attention=sdpa."
        )
    else:
        more["is_causal"] = True
        query = query if scaling is None else query * (scaling * query.shape[-1] ** 0.5)
    joined: Any = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **more)
    return joined


@torch.compiler.disable  # as many calls as there are segments; compile=true is refused where this would run
def _each(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k t d"],
    value: Float[Tensor, "b k t d"],
    boundaries: Int[Tensor, " ends"],
    scaling: float | None,
    sliding_window: int | None,
    dropout: float = 0.0,
) -> Float[Tensor, "b t h d"]:
    rows, heads, length, width = query.shape
    found = []
    for start, stop in pairwise(boundaries.tolist()):
        row, first, size = start // length, start % length, stop - start
        q, k, v = (states[row : row + 1, :, first : first + size] for states in (query, key, value))
        band = None if sliding_window is None or size <= sliding_window else _band(size, sliding_window, query.device)
        out = F.scaled_dot_product_attention(
            q, k, v, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1).view(rows, length, heads, width)


def _band(size: int, window: int, device: torch.device) -> Tensor:
    at = torch.arange(size, device=device)
    back = at[:, None] - at
    return ((back >= 0) & (back < window))[None, None]


AttentionInterface.register(Attention.varlen.value, varlen_attention)
AttentionMaskInterface.register(Attention.varlen.value, sdpa_mask)
