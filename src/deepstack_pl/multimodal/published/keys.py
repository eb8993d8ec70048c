"""Names of tensors in published checkpoints and here, both ways (method F). No model is needed, only its configuration.

Two differences are more than names: the tower's queries, keys and values are three tensors there and one here, and
layers that the published code appends to the tower (``post_encoder``) are the tower's last ones here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepstack_pl.multimodal.config import Sharing
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.published.configuration import post_encoder_layers

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor where they are tied
_OURS = "vision_tower.tower.visual."
_BLOCKS = "transformer.resblocks."
_TOWER = "model.vision_tower.vision_tower.vision_model."
_TOWER_5 = "model.vision_tower.vision_tower."  # as transformers >= 5 names the same tower
_APPENDED = "model.vision_tower.post_encoder."
_FUSED = "attn.in_proj_"
_STEM = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def to_published(ours: str, config: DeepStackConfig) -> tuple[str, ...]:
    """The published names of one of our tensors: one, or those of the queries, keys and values that it joins.

    Raises:
        ValueError: the published code has no such tensor.
    """
    if ours.startswith("language_model."):
        return (ours.removeprefix("language_model."),)
    if ours == "image_newline":
        return ("model.image_newline",)
    if ours.startswith("projector.") and Sharing(config.projector_sharing) is Sharing.shared:
        return (f"model.mm_projector.{ours.removeprefix('projector.')}",)
    if ours.startswith(_OURS):
        return _tower_names(ours.removeprefix(_OURS), config)
    raise ValueError(
        f"{ours}: published checkpoints have no such tensor (gates and a second projector exist in this project "
        "alone). Models with it stay in this project's format."
    )


def canonical(published: str) -> str:
    """A published name as the published code writes it: with a level that transformers >= 5 leaves out."""
    if published.startswith(_TOWER_5) and not published.startswith(_TOWER):
        return _TOWER + published.removeprefix(_TOWER_5)
    return published


def rename_to_published(tensors: Mapping[str, Tensor], config: DeepStackConfig) -> dict[str, Tensor]:
    """``tensors`` (or gradients; any part of the model's) under their published names."""
    renamed: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        names = to_published(ours, config)
        renamed |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True))
    return renamed


def rename_to_ours(tensors: Mapping[str, Tensor], config: DeepStackConfig) -> dict[str, Tensor]:
    """Published ``tensors``, a whole checkpoint or a part, under this project's names.

    Raises:
        ValueError: names that nothing here answers to, or a part of an attention's queries, keys and values.
    """
    found = {canonical(name): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    left_over = dict(found)
    for ours in {to_ours(name, config): None for name in found}:
        names = to_published(ours, config) if ours is not None else ()
        if not names or any(name not in found for name in names):
            continue
        parts = [left_over.pop(name) for name in names]
        assert ours is not None
        renamed[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if left_over:
        raise ValueError(
            f"{named(left_over)}: nothing in this project answers to them, or a part is missing: an attention's "
            "q_proj, k_proj and v_proj come together."
        )
    return renamed


def to_ours(published: str, config: DeepStackConfig) -> str | None:
    """Our name of the tensor that a published one is, or is a third of; None for one that is not known."""
    name = canonical(published)
    if name.startswith(_TOWER):
        return _our_tower_name(name.removeprefix(_TOWER), 0, "encoder.layers.")
    if name.startswith(_APPENDED):
        first = config.vision["layers"] - post_encoder_layers(config)
        return _our_tower_name(name.removeprefix(_APPENDED), first, "")
    if name.startswith("model.mm_projector."):
        return f"projector.{name.removeprefix('model.mm_projector.')}"
    if name == "model.image_newline":
        return "image_newline"
    return None if name.startswith("model.vision_tower.") else f"language_model.{name}"


def spare_head(config: DeepStackConfig, files: Mapping[str, Tensor], found: dict[str, str], source: str) -> list[str]:
    """A tied head that is stored beside the embeddings: its name, which leaves ``found``.

    Raises:
        ValueError: it is not the embeddings.
    """
    if not config.text_config.tie_word_embeddings or not {EMBEDDINGS, HEAD} <= found.keys():
        return []
    one, other = (files[found[name]] for name in (EMBEDDINGS, HEAD))
    same = one.dtype is other.dtype and one.shape == other.shape
    if not same or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        raise ValueError(
            f"{source}: tie_word_embeddings says that {HEAD} is {EMBEDDINGS}, but two different tensors are stored. "
            "Say tie_word_embeddings: false in config.json if both were trained; nothing was written."
        )
    return [found.pop(HEAD)]


def named(names: Mapping[str, object] | list[str], most: int = 5) -> str:
    """A handful of names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _tower_names(name: str, config: DeepStackConfig) -> tuple[str, ...]:
    if name in _STEM:
        return (_TOWER + _STEM[name],)
    number, _, part = name.removeprefix(_BLOCKS).partition(".")
    first_appended = config.vision["layers"] - post_encoder_layers(config)
    appended = int(number) - first_appended
    stem = f"{_TOWER}encoder.layers.{number}." if appended < 0 else f"{_APPENDED}{appended}."
    if part.startswith(_FUSED):
        return tuple(f"{stem}self_attn.{x}_proj.{part.removeprefix(_FUSED)}" for x in "qkv")
    module, _, kind = part.rpartition(".")
    return (f"{stem}{_BLOCK[module]}.{kind}",)


def _our_tower_name(name: str, first: int, prefix: str) -> str | None:
    stems = {theirs: ours for ours, theirs in _STEM.items()}
    if prefix and name in stems:
        return _OURS + stems[name]
    number, _, part = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not number.isdecimal():
        return None
    stem = f"{_OURS}{_BLOCKS}{int(number) + first}."
    module, _, kind = part.rpartition(".")
    if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return f"{stem}{_FUSED}{kind}"
    blocks = {theirs: ours for ours, theirs in _BLOCK.items()}
    return f"{stem}{blocks[module]}.{kind}" if module in blocks else None
