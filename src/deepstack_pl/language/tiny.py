"""A family's twin for two CPU cores: its architecture's values, shrunk by rule. Loads without torch."""

from copy import deepcopy
from typing import Any

# No value of the twin is larger. Deep enough for four groups from layer 8 on; 512 words are the shipped tokenizer's;
# prompts with an image outgrow the window.
_MOST = {"num_hidden_layers": 12, "intermediate_size": 256, "vocab_size": 512, "head_dim": 32, "sliding_window": 32}
_WIDTH, _HEADS = 96, 4
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the shipped tokenizer's
_ROPE = ("rope_parameters", "rope_scaling")


def shrink(architecture: dict[str, Any]) -> dict[str, Any]:
    """The values of the tiny twin: each at most what the rule allows, so that a smaller one is kept as written.

    Kept: what makes the family. How many query heads share a key head, a head_dim of its own, a sliding window and
    which layers have it, rotary scaling, tied embeddings, multipliers.
    """
    tiny = deepcopy(architecture)
    for name, most in _MOST.items():
        if tiny.get(name):  # null means none: no window, no head_dim of its own
            tiny[name] = min(tiny[name], most)
    heads = tiny.get("num_attention_heads", _HEADS)
    keys = tiny.get("num_key_value_heads") or heads
    shared = heads // keys
    keys = min(keys, max(1, _HEADS // shared))
    heads = shared * keys
    even = 2 * round(_WIDTH / heads / 2)  # rotary embeddings turn pairs
    tiny["hidden_size"] = min(tiny.get("hidden_size", _WIDTH), heads * max(2, even))
    tiny["num_attention_heads"] = heads
    if tiny.get("num_key_value_heads"):
        tiny["num_key_value_heads"] = keys
    tiny["initializer_range"] = 0.06  # 0.02 is for widths of thousands
    tiny |= {name: token for name, token in _TOKENS.items() if name in tiny}
    head = tiny.get("head_dim") or tiny["hidden_size"] // heads
    if "query_pre_attn_scalar" in tiny:
        tiny["query_pre_attn_scalar"] = head
    if tiny.get("layer_types"):
        tiny["layer_types"] = tiny["layer_types"][: tiny["num_hidden_layers"]]
    for name in _ROPE:
        if tiny.get(name):
            _shorten(tiny[name], head)
    return tiny


def _shorten(rope: dict[str, Any], head: int) -> None:
    """Factors by frequency (longrope) are as many as there are pairs."""
    pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    for key, value in rope.items():
        if isinstance(value, list):
            rope[key] = value[:pairs]
        elif isinstance(value, dict):  # by type of layer
            _shorten(value, head)
