"""The published code's way of saying a plan (method A.6, A.7, B), read and written. Loads without torch.

Published configs say most of a plan with words joined by ``+`` in ``deepstack_args_for_ablation``, a misspelt one being
no ablation. Here every word is known or refused, and so is every combination that the published code cannot run in a
known way.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from deepstack_pl.stacking.config import (
    Dealing,
    Encoding,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Order,
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig

PLAN_KEYS = (
    "image_aspect_ratio",
    "num_crops",
    "deepstack_start_id",
    "deepstack_interval",
    "deepstack_sampling",
    "deepstack_args_for_ablation",
    "is_anyres_deepstack",
    "twoviews_unshare",
)
WORDS = "deepstack_args_for_ablation"
START = "lsvit_start_layer_"
FEWEST_TILES = 2
SAMPLINGS = {
    "2d": (Dealing.strided_2d, 1),
    "1d": (Dealing.strided_1d, 1),
    "grid": (Dealing.tiles, 1),
    "2d_scaledown": (Dealing.strided_2d, 2),
}
# What an image contributes, and to which layers: at most one of them.
_LAYOUTS = (
    "dummy_local",
    "only_global_features",
    "global_and_local",
    "string_woglobal",
    "string_withglobal",
    "deepstack_vit",
)
_LETTERBOX = ("inconsistent", "anyres_unpad")
_KNOWN = (*_LAYOUTS, *_LETTERBOX, "2xsample", "hires_local", "scaledown_clip")
_CRASHES = ("hires_local", "2d_scaledown", "twoviews_unshare")


def words_of(published: Mapping[str, Any]) -> set[str]:
    """The words of a published config: missing, null and empty all mean none, though published code crashes on null.

    Raises:
        ValueError: a word that the published code does not read.
    """
    text = published.get(WORDS) or ""
    if not isinstance(text, str):
        raise ValueError(f"{WORDS}={text!r} is no text: it holds words joined by '+'. Correct config.json.")
    words = {word for word in text.split("+") if word}
    for word in sorted(words):
        if word not in _KNOWN and not (word.startswith(START) and word.removeprefix(START).isdecimal()):
            raise ValueError(
                f"{WORDS}={text!r}: the published code has no word {word!r} and would ignore it in silence. It reads "
                f"{', '.join(_KNOWN)} and {START}N, joined by '+'. Correct or remove it in config.json."
            )
    return words


def vit_start(published: Mapping[str, Any]) -> int | None:
    """Before which layer of the tower DeepStack-V begins (None: it does not stack there).

    Raises:
        ValueError: a start without the stack, or the stack without one start.
    """
    words = words_of(published)
    starts = sorted(int(word.removeprefix(START)) for word in words if word.startswith(START))
    stacks = "deepstack_vit" in words
    if stacks and len(starts) != 1:
        raise ValueError(
            f"{WORDS}={published[WORDS]!r}: deepstack_vit needs one start, and has {starts or 'none'}; the published "
            f"code compares a missing one with a number and crashes. Add {START}N, N being the first layer."
        )
    if starts and not stacks:
        raise ValueError(
            f"{WORDS}={published[WORDS]!r}: {START}{starts[0]} is read with deepstack_vit alone. Add that word, or "
            "remove this one."
        )
    return starts[0] if stacks else None


def crashing_words(published: Mapping[str, Any]) -> list[str]:
    """What the published code says in this config and crashes on; this project runs it as it was meant."""
    said = {*words_of(published), published.get("deepstack_sampling")}
    return [word for word in _CRASHES if word in said or (word == "twoviews_unshare" and published.get(word))]


def plan_values(published: Mapping[str, Any]) -> ModelConfig:
    """The plan that a published config says, as a person would write it here; injections beyond the depth are dropped.

    Raises:
        ValueError: a value, a word or a combination without a meaning, named.
    """
    if published.get("image_aspect_ratio") != "deepstack":
        raise ValueError(
            f"image_aspect_ratio={published.get('image_aspect_ratio')!r}: only 'deepstack' cuts images into the views "
            "that are stacked. A checkpoint with another one is no DeepStack model."
        )
    words, start = words_of(published), vit_start(published)
    crops = _whole(published, "num_crops", 4)
    if crops < FEWEST_TILES:
        raise ValueError(
            f"num_crops={crops}: the published code has no grid of fewer than two crops, and crashes without one. "
            "Correct config.json."
        )
    sampling = published.get("deepstack_sampling", "2d")
    if not isinstance(sampling, str) or sampling not in SAMPLINGS:
        raise ValueError(f"deepstack_sampling={sampling!r}: published are {', '.join(SAMPLINGS)}. Say one of these.")
    hd = bool(published.get("is_anyres_deepstack", False))
    if hd and isqrt(crops) < 2:
        raise ValueError(
            f"num_crops={crops} with is_anyres_deepstack: every view is enlarged u = floor(sqrt(num_crops)) times, and "
            "u must be 2 or more here. Correct num_crops, or say is_anyres_deepstack: false."
        )
    layout = _check_together(words, sampling, hd, crops)
    dealing, pooling = SAMPLINGS[sampling]
    square = bool(words & {"2xsample", "hires_local"})
    values = ModelConfig(
        name=_name(words, hd),
        tiles=crops,
        grid=GridRule.square if square else GridRule.best_fit,
        resize=Resize.letterbox if words & set(_LETTERBOX) else Resize.stretch,
        encoding=Encoding.one_pass if "hires_local" in words else Encoding.separate,
        pooling=2 if "scaledown_clip" in words else pooling,
        dealing=dealing,
        start_layer=_whole(published, "deepstack_start_id", 1, least=0),
        interval=_whole(published, "deepstack_interval", 1, least=1),
        groups=isqrt(crops) ** 2 if square else crops,
        overflow=Overflow.drop,  # as the published code does in silence
    )
    if hd:
        values.detail = isqrt(crops)
        values.sequence, values.order = Sequence.global_and_tiles, Order.raster
        values.newline, values.source, values.groups = Newline.rows_and_groups, Source.detail, values.detail**2
    match layout:
        case "dummy_local":
            values.source, values.groups = Source.global_view, crops
        case "only_global_features":
            values.sequence, values.source, values.groups = Sequence.blank, Source.global_view, 1
        case "global_and_local":
            values.sequence = Sequence.blank
            values.injections = [InjectionConfig(source=Source.global_view, layer=values.start_layer)]
            values.start_layer += values.interval
        case "string_woglobal" | "string_withglobal":
            with_global = layout == "string_withglobal"
            values.sequence = Sequence.global_and_tiles if with_global else Sequence.tiles
            values.unfilled, values.groups = Unfilled.zeros, 0
        case "deepstack_vit":
            assert start is not None
            values.host, values.start_layer, values.interval = Host.vit, start, 1
    return values


def published_plan(published: Mapping[str, Any], *, llm_layers: int, vision: VisionConfig) -> Plan:
    """The plan that a published config says, for hosts of these depths.

    The published code adds before layers alone: where the feature is the output of the tower's very last layer, nothing
    is added to it, which plans here could (method B.3, B.4).

    Raises:
        ValueError: a value, a word or a combination without a meaning, named.
    """
    plan = Plan.build(plan_values(published), llm_layers=llm_layers, vit_layers=vision.tap)
    if vision.tap < vision.layers:
        return plan
    behind = [i for i in plan.injections if i.host is Host.vit and i.layer == vision.tap]
    kept = tuple(i for i in plan.injections if i not in behind)
    return replace(plan, injections=kept, dropped=(*behind, *plan.dropped))


def _name(words: set[str], hd: bool) -> str:
    if "deepstack_vit" in words:
        first, implied = "deepstack_v", {"deepstack_vit", "2xsample"}
    else:
        first, implied = "deepstack_l_hd" if hd else "deepstack_l", set()
    return "+".join([first, *sorted(word for word in words - implied if not word.startswith(START))])


def _check_together(words: set[str], sampling: str, hd: bool, crops: int) -> str | None:
    """The one layout word; refuses what does not go together."""
    said = "+".join(sorted(words))
    layouts = [word for word in _LAYOUTS if word in words]
    if len(layouts) > 1:
        raise ValueError(
            f"{WORDS}={said!r}: {' and '.join(layouts)} each say what becomes of the groups, and only one can. Leave "
            "one in config.json."
        )
    if hd and (words or sampling != "2d"):
        raise ValueError(
            f"is_anyres_deepstack with {WORDS}={said!r} and deepstack_sampling={sampling!r}: with most words the "
            "published code crashes there, and what the others would do is not known. DeepStack-L-HD has no words and "
            "deals 2d: correct config.json."
        )
    if "deepstack_vit" in words and ("2xsample" not in words or sampling != "2d"):
        raise ValueError(
            f"{WORDS}={said!r} with deepstack_sampling={sampling!r}: in the tower every image has the square grid "
            "(other grids fail an assertion there) and is dealt 2d. Add 2xsample, and leave deepstack_sampling at 2d."
        )
    if "scaledown_clip" in words and "deepstack_vit" not in words:
        raise ValueError(
            f"{WORDS}={said!r}: scaledown_clip pools the text sequence alone, and groups of another length would "
            "spill onto the text after it. It goes with deepstack_vit; in the LLM say deepstack_sampling=2d_scaledown."
        )
    if "2xsample" in words and any(word.startswith("string_") for word in layouts) and isqrt(crops) ** 2 != crops:
        raise ValueError(
            f"{WORDS}={said!r} with num_crops={crops}: 2xsample fills {isqrt(crops) ** 2} of the {crops} groups that "
            "are strung together. Use a square number of crops."
        )
    return layouts[0] if layouts else None


def _whole(published: Mapping[str, Any], key: str, missing: int, *, least: int | None = None) -> int:
    value = published.get(key, missing)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key}={value!r} is no whole number. Correct it in config.json, or remove it for {missing}.")
    if least is not None and value < least:
        raise ValueError(
            f"{key}={value}: it is at least {least}. Correct it in config.json, or remove it for {missing}."
        )
    return value
