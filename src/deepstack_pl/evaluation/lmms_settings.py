"""What tasks of lmms-eval say of generation, and requests that may be answered together."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance

READ = {"max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
OF_OTHERS = {"image_aspect_ratio"}  # LLaVA's: how to cut a picture up, which here the plan says


def settings_of(request: Instance) -> dict[str, Any]:
    """What the task says of generation: the one dict among a request's arguments.

    Raises:
        ValueError: a setting that would be passed over.
    """
    settings: dict[str, Any] = next(each for each in request.args if isinstance(each, dict))
    unknown = sorted({*settings} - READ - OF_OTHERS)
    if unknown:
        raise ValueError(
            f"task {request.task_name}: generation_kwargs has {', '.join(unknown)}, which deepstack_pl does not read. "
            f"It reads {', '.join(sorted(READ))}; override them with --gen_kwargs, or leave the task out."
        )
    return settings


def whole_number(value: Any, name: str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"generation_kwargs {name}={value}: use a whole number, 1 or more.")
    return int(value)


def number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs {name}={value!r}: use a number.") from error


def stops_of(settings: dict[str, Any]) -> list[str]:
    given = settings.get("until") or []
    return [stop for stop in ([given] if isinstance(given, str) else given) if stop]


def before(text: str, stops: Sequence[str]) -> str:
    """``text`` before the first of ``stops``."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


def alike(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def batches(order: Sequence[int], size: int, key: Callable[[int], str]) -> Iterable[list[int]]:
    """``order`` in batches of at most ``size`` places of one key."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) == size or key(place) != key(batch[0])):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
