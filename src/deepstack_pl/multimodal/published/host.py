"""The LLM's values in a published config.json, read and written.

Published configs hold them flat, as transformers 4.39 wrote them: among keys that only ever spoke to ``generate``, and
with the rotary settings in two keys that transformers 5 keeps in one.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING


@dataclass(frozen=True, slots=True)
class PublishedHost:
    """One of the LLMs that the published code knows.

    Attributes:
        scalings: rotary scalings that transformers 4.39 and 5 compute alike, by transformers 5's name.
        implied: values of transformers 5 that 4.39 had no key for, with the one it implies.
    """

    model_type: str  # published
    family: str  # transformers'
    architecture: str
    template: str
    scalings: Mapping[str, str]
    implied: Mapping[str, Any]


HOSTS = {
    host.model_type: host
    for host in (
        PublishedHost(
            model_type="deepstack_llama",
            family="llama",
            architecture="DeepstackLlamaForCausalLM",
            template="vicuna_v1",
            scalings={"linear": "linear", "dynamic": "dynamic"},
            implied={"mlp_bias": False},
        ),
        PublishedHost(
            model_type="deepstack_phi",
            family="phi3",
            architecture="DeepstackPhiForCausalLM",
            template="phi3_instruct",
            scalings={"longrope": "su"},
            implied={},
        ),
    )
}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_OLD_NAMES = {"su": "longrope"}  # Phi-3's first name for it


def host_of(published: Mapping[str, Any]) -> PublishedHost:
    """The host that a published config names.

    Raises:
        ValueError: it is another one.
    """
    kind = published.get("model_type")
    if not isinstance(kind, str) or kind not in HOSTS:
        known = " and ".join(f"{name} (a {host.family})" for name, host in HOSTS.items())
        raise ValueError(
            f"model_type={kind!r}: published DeepStack checkpoints are {known}. Convert one of these; a plain language "
            "model needs no conversion: name it as llm.checkpoint."
        )
    return HOSTS[kind]


def host_keys(host: PublishedHost) -> set[str]:
    """The published keys that the host's configuration takes."""
    generic = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(CONFIG_MAPPING[host.family])} - generic - {"rope_parameters"}
    return {*own, *_ROPE_KEYS, "torch_dtype", "dtype"}


def read_host(published: Mapping[str, Any]) -> PreTrainedConfig:
    """The host's own configuration: every value of it that stands in ``published``, and nothing else.

    Raises:
        ValueError: a value that transformers refuses, or would compute with in another way.
    """
    host = host_of(published)
    own = host_keys(host) - {"torch_dtype", "dtype", "rope_scaling"}
    values: dict[str, Any] = {key: deepcopy(published[key]) for key in own if key in published}
    values["dtype"] = _dtype(published)
    theta = published.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < inf):
        raise ValueError(f"rope_theta={theta!r}: the rotary base is a number above 0. Correct it in config.json.")
    scaling = _scaling(published, host)
    if scaling is not None:
        values["rope_scaling"] = scaling
    try:
        config = CONFIG_MAPPING[host.family](**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: transformers refuses its values for a {host.family}: {reason}") from error
    return config


def write_host(config: PreTrainedConfig) -> dict[str, Any]:
    """The published keys that say ``config``; the inverse of `read_host`.

    Raises:
        ValueError: the published code has no such host, or no key for one of its values.
    """
    host = next((host for host in HOSTS.values() if host.family == config.model_type), None)
    if host is None:
        raise ValueError(
            f"The language model is a {config.model_type}, which the published code does not know: it has "
            f"{' and '.join(host.family for host in HOSTS.values())} alone. Keep this model in this project's format."
        )
    values = config.to_dict()
    own = host_keys(host) - {"torch_dtype", "dtype", *_ROPE_KEYS, *host.implied, "head_dim"}
    for key, implied in {**host.implied, "head_dim": config.hidden_size // config.num_attention_heads}.items():
        if values.get(key, implied) != implied:
            raise ValueError(
                f"The language model has {key}={values[key]}, for which published configs have no key: there it is "
                f"{implied}. Keep this model in this project's format."
            )
    written = {key: values[key] for key in sorted(own)}
    written["rope_theta"], written["rope_scaling"] = _write_rope(values, host)
    written["torch_dtype"] = values["dtype"]
    written["model_type"], written["architectures"] = host.model_type, [host.architecture]
    return written


def same_host(one: Mapping[str, Any], other: PreTrainedConfig) -> bool:
    """Whether the host in a published config is ``other``; how it was written down does not count."""
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    theirs, ours = read_host(one).to_dict(), other.to_dict()
    return all(theirs.get(key) == ours.get(key) for key in (theirs.keys() | ours.keys()) - ignored)


def _dtype(published: Mapping[str, Any]) -> str | None:
    name = published.get("torch_dtype") or published.get("dtype")
    if name is not None and not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise ValueError(f"torch_dtype={name!r} is no dtype of torch. Say float32, float16 or bfloat16 in config.json.")
    return name


def _scaling(published: Mapping[str, Any], host: PublishedHost) -> dict[str, Any] | None:
    """Rotary scaling under transformers 5's names."""
    scaling = published.get("rope_scaling")
    if not scaling:
        return None
    if not isinstance(scaling, Mapping):
        raise ValueError(
            f"rope_scaling={scaling!r} is no object with a type and its factors. Correct config.json, or say null."
        )
    scaling = deepcopy(dict(scaling))
    said = scaling.pop("rope_type", scaling.pop("type", None))
    scaling.pop("type", None)
    kind = _OLD_NAMES.get(said, said) if isinstance(said, str) else None
    if kind not in host.scalings:
        raise ValueError(
            f"rope_scaling={published['rope_scaling']}: the published code and this one compute the types "
            f"{', '.join(sorted({*host.scalings, *host.scalings.values()}))} of a {host.family} alike, not {said!r}. A "
            "checkpoint with it cannot be converted exactly."
        )
    scaling["rope_type"] = kind
    if kind == "longrope":
        longest = published.get("max_position_embeddings", CONFIG_MAPPING[host.family]().max_position_embeddings)
        original = published.get(
            "original_max_position_embeddings", CONFIG_MAPPING[host.family]().original_max_position_embeddings
        )
        scaling.setdefault("factor", max(1.0, longest / original))
    return scaling


def _write_rope(values: Mapping[str, Any], host: PublishedHost) -> tuple[float, dict[str, Any] | None]:
    rope = values["rope_parameters"]
    kind, partial = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0 or kind not in {"default", *host.scalings}:
        raise ValueError(
            f"rope_parameters={rope}: published configs have no key for a part of the rotary dimensions, and for a "
            f"{host.family} no scaling but {', '.join(host.scalings)}. Keep this model in this project's format."
        )
    if kind == "default":
        return rope["rope_theta"], None
    left_out = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    scaling = {key: value for key, value in rope.items() if key not in left_out}
    if kind == "longrope":
        _check_longrope(scaling.pop("factor", None), values)
    return rope["rope_theta"], {"type": host.scalings[kind], **scaling}


def _check_longrope(factor: float | None, values: Mapping[str, Any]) -> None:
    """Published code takes the factor from the two lengths."""
    implied = max(1.0, values["max_position_embeddings"] / values["original_max_position_embeddings"])
    if factor not in (None, implied):
        raise ValueError(
            f"rope_parameters has factor={factor}, but published code computes it as max_position_embeddings / "
            f"original_max_position_embeddings = {implied}. Keep this model in this project's format."
        )
