"""The vision tower that a published checkpoint was made with: CLIP's own config files to a `VisionConfig`, and back.

Published configs only name the tower; its shape stands in another repository, its weights (whatever the published
loader thinks, method E6) in the checkpoint.
"""

from collections.abc import Mapping
from math import inf, isclose, isfinite, nextafter
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig

from deepstack_pl.vision.config import VisionConfig

# Towers that need no files: VisionConfig's defaults are the first.
OPENAI: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {},
    "openai/clip-vit-large-patch14": {"image_size": 224},
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_BICUBIC = 3
_COUNTS = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_tower(
    name: str, tower: Mapping[str, Any] | None, pixels: Mapping[str, Any] | None, **more: Any
) -> VisionConfig:
    """The tower, with ``more`` values that its own files do not say.

    Args:
        name: what ``mm_vision_tower`` says.
        tower: a CLIP vision configuration, or a whole CLIP configuration with one in it.
        pixels: a CLIP preprocessor_config.json; None means CLIP's own mean and deviation.

    Raises:
        ValueError: no CLIP tower, or images prepared in another way than this project does.
    """
    if tower is None:
        if name not in OPENAI:
            raise ValueError(
                f"mm_vision_tower={name!r}: its configuration is not at hand, and only "
                f"{' and '.join(OPENAI)} are known without one. Give the folder with its config.json (--vision-tower)."
            )
        values: dict[str, Any] = dict(OPENAI[name])
    else:
        values = _shape(name, tower)
    if pixels is not None:
        size = values.get("image_size", VisionConfig.__dataclass_fields__["image_size"].default)
        values |= _pixels(name, pixels, size)
    return VisionConfig(**{"name": name, **values, **more})


def known_tower(vision: VisionConfig, layers: int) -> str | None:
    """The name of the OpenAI tower with this shape and these pixels, if it is one."""
    shown = ("image_size", "patch_size", "width", "heads", "mlp_ratio", "quick_gelu", "layer_norm_eps", "mean", "std")
    for name, values in OPENAI.items():
        known = VisionConfig(**values)
        if layers == known.layers and all(getattr(vision, key) == getattr(known, key) for key in shown):
            return name
    return None


def write_tower(vision: VisionConfig, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json of a tower of ``layers`` layers that is no known one."""
    tower = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "quick_gelu" if vision.quick_gelu else "gelu",
        "layer_norm_eps": vision.layer_norm_eps,
        "attention_dropout": 0.0,
    }
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "do_convert_rgb": True,
    }
    return tower, pixels


def _shape(name: str, tower: Mapping[str, Any]) -> dict[str, Any]:
    shape = tower.get("vision_config", tower)
    kind = tower.get("model_type")
    if kind not in ("clip", "clip_vision_model") or not isinstance(shape, Mapping):
        raise ValueError(
            f"mm_vision_tower={name!r} is a {kind!r}: published towers are CLIP's (model_type clip or "
            "clip_vision_model). Name a CLIP tower."
        )
    try:
        clip = CLIPVisionConfig(**{key: value for key, value in shape.items() if key != "model_type"})
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"mm_vision_tower={name!r}: transformers refuses its config.json: {reason}") from error
    if clip.hidden_act not in _ACTIVATIONS or clip.num_channels != 3:
        raise ValueError(
            f"mm_vision_tower={name!r} has hidden_act={clip.hidden_act!r} and num_channels={clip.num_channels}: towers "
            f"here have {' or '.join(_ACTIVATIONS)}, and 3 channels. It cannot be converted."
        )
    counts = {key: getattr(clip, key) for key in _COUNTS}
    wrong = {key: value for key, value in counts.items() if type(value) is not int or value < 1}
    if not _is_number(clip.layer_norm_eps):
        wrong["layer_norm_eps"] = clip.layer_norm_eps
    if wrong:
        raise ValueError(
            f"mm_vision_tower={name!r}: its config.json says {wrong}: sizes and depths are whole numbers from 1 on. "
            "Give the tower's own config.json."
        )
    return {
        "image_size": clip.image_size,
        "patch_size": clip.patch_size,
        "width": clip.hidden_size,
        "layers": clip.num_hidden_layers,
        "heads": clip.num_attention_heads,
        "mlp_ratio": _ratio(clip.intermediate_size, clip.hidden_size),
        "quick_gelu": _ACTIVATIONS[clip.hidden_act],
        "layer_norm_eps": clip.layer_norm_eps,
    }


def _ratio(inner: int, width: int) -> float:
    """The ratio from which open_clip, which rounds down, computes ``inner`` again."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else nextafter(ratio, inf)


def _pixels(name: str, pixels: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Mean and deviation; refuses what would change a view that is already as large as the tower's."""
    rules: dict[str, tuple[Any, bool]] = {
        "size": (pixels.get("size", 224), _is_square(pixels.get("size", 224), size)),
        "crop_size": (
            pixels.get("crop_size", 224),
            not pixels.get("do_center_crop", True) or _is_square(pixels.get("crop_size", 224), size),
        ),
        "resample": (pixels.get("resample", _BICUBIC), pixels.get("resample", _BICUBIC) == _BICUBIC),
        "do_rescale": (pixels.get("do_rescale", True), bool(pixels.get("do_rescale", True))),
        "rescale_factor": (
            pixels.get("rescale_factor", 1 / 255),
            _is_number(pixels.get("rescale_factor", 1 / 255))
            and isclose(pixels.get("rescale_factor", 1 / 255), 1 / 255),
        ),
        "do_normalize": (pixels.get("do_normalize", True), bool(pixels.get("do_normalize", True))),
    }
    for key in ("image_mean", "image_std"):
        given = pixels.get(key, [0.5] * 3)
        three = isinstance(given, list) and len(given) == 3 and all(map(_is_number, given))
        rules[key] = (given, three and (key == "image_mean" or all(given)))
    wrong = {key: value for key, (value, holds) in rules.items() if not holds}
    if wrong:
        raise ValueError(
            f"mm_vision_tower={name!r}: its preprocessor_config.json says {wrong}. Views are cut {size} pixels wide, "
            f"with bicubic resizing ({_BICUBIC}), scaled by 1/255 and normalised; another image processor would change "
            "them. Give the tower's own preprocessor_config.json."
        )
    return {
        ours: list(pixels[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in pixels
    }


def _is_square(said: Any, size: int) -> bool:
    sides = list(said.values()) if isinstance(said, Mapping) else [said]
    return bool(sides) and all(side == size for side in sides)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and isfinite(value)) or (isinstance(value, int) and abs(value) < 2**53)
