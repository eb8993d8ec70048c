"""A plan in the published code's words: the way back of `words`."""

from dataclasses import replace
from typing import Any

from deepstack_pl.multimodal.published.words import FEWEST_TILES, SAMPLINGS, START, WORDS, published_plan
from deepstack_pl.stacking.config import Encoding, GridRule, Host, Newline, Operator, Resize, Sequence, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig


def published_values(plan: Plan, vision: VisionConfig) -> dict[str, Any]:
    """The published keys that say ``plan``, all of them.

    They are the nearest guess, read back: what then differs has no published word.

    Raises:
        ValueError: naming what the published code cannot say.
    """
    if plan.tiles < FEWEST_TILES:
        raise ValueError(f"plan {plan.name} has no published words: {_about_tiles(plan, vision)}")
    said = _guess(plan)
    try:
        again = published_plan(said, llm_layers=plan.llm_layers, vision=vision)
    except ValueError as error:
        raise ValueError(f"plan {plan.name} has no published words: {error}") from error
    if again.digest != plan.digest:
        ours, theirs = plan.to_dict(), again.to_dict()
        keys = [key for key in ours if key != "name" and ours[key] != theirs[key]]
        if keys == ["grid"] and again.grid is GridRule.square:
            raise ValueError(
                f"plan {plan.name} has no published words: its images have the grid {plan.grid.value}, and published "
                "stacks in the tower the square one alone. Train with model.grid=square, or keep this model in this "
                "project's format."
            )
        differ = [_difference(key, ours[key], theirs[key]) for key in keys]
        raise ValueError(
            f"plan {plan.name} has no published words: the nearest are {said[WORDS]!r} with deepstack_sampling="
            f"{said['deepstack_sampling']!r}, which differ in {'; '.join(differ)}. Only plans that the published code "
            "can say go back to its format; keep this one in this project's."
        )
    return said


def _about_tiles(plan: Plan, vision: VisionConfig) -> str:
    """Why a plan without tiles cannot be said, and with how many it could be, where nothing would change by them."""
    schedule = (*plan.injections, *plan.dropped)
    if not schedule:
        return "it stacks nothing, which is plain LLaVA. That has a format of its own."
    groups = 4 if plan.sequence is Sequence.blank else len(schedule)  # dummy_local has one for each crop
    tiles = max(groups, FEWEST_TILES)
    always = f"published plans always cut tiles (num_crops >= {FEWEST_TILES}), also where nothing reads them"
    try:
        published_values(replace(plan, tiles=tiles), vision)
    except ValueError:
        return f"{always}, and this one differs in more. Keep this model in this project's format."
    return (
        f"{always}. No result depends on them here: set model.tiles={tiles} (plan.tiles in the model's config.json) "
        "for the way back."
    )


def _guess(plan: Plan) -> dict[str, Any]:
    sources = {injection.source for injection in plan.injections}
    in_tower = any(injection.host is Host.vit for injection in plan.injections)
    words = ["2xsample"] if plan.grid is GridRule.square or in_tower else []  # the tower has no other
    words += ["inconsistent"] if plan.resize is Resize.letterbox else []
    words += ["hires_local"] if plan.encoding is Encoding.one_pass else []
    words += ["scaledown_clip"] if plan.pooling > 1 and in_tower else []
    schedule = sorted((*plan.injections, *plan.dropped), key=lambda injection: (injection.layer, injection.group))
    start = schedule[0].layer if schedule else 1
    if in_tower:
        words += ["deepstack_vit", f"{START}{start}"]
    elif plan.detail == 1:
        words += _layout_words(plan, sources)
    interval = schedule[1].layer - start if len(schedule) > 1 and not in_tower else 1
    sampling = {dealing: name for name, (dealing, pooling) in SAMPLINGS.items() if pooling == 1}[plan.dealing]
    return {
        "image_aspect_ratio": "deepstack",
        "num_crops": plan.tiles,
        "deepstack_start_id": 1 if in_tower else start,
        "deepstack_interval": interval,
        "deepstack_sampling": "2d" if in_tower else "2d_scaledown" if plan.pooling > 1 else sampling,
        WORDS: "+".join(words),
        "is_anyres_deepstack": plan.detail > 1,
        "twoviews_unshare": False,  # the projector's, not the plan's
        "mm_patch_merge_type": "spatial_unpad" if plan.newline is not Newline.none else "flat",
    }


def _layout_words(plan: Plan, sources: set[Source]) -> list[str]:
    match plan.sequence:
        case Sequence.blank:
            return ["only_global_features" if sources == {Source.global_view} else "global_and_local"]
        case Sequence.tiles:
            return ["string_woglobal"]
        case Sequence.global_and_tiles:
            return ["string_withglobal"]
        case _:
            return ["dummy_local"] if sources == {Source.global_view} else []


def _difference(key: str, ours: Any, theirs: Any) -> str:
    if key not in ("injections", "dropped"):
        return f"{key} ({ours}, published {theirs})"
    if any(injection["operator"] != Operator.add.value for injection in ours):
        return f"{key}: published injections have no gates"
    shown = [f"{i['host']} layer {i['layer']}" for i in ours if i not in theirs] or ["fewer of them"]
    return f"{key}: {', '.join(shown[:4])}, where the published schedule has none"
