"""Places that a plan names: layers, taps and groups that must exist in its hosts. Loads without torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepstack_pl.stacking.config import Host, Injection, Source
from deepstack_pl.stacking.rules import most_groups

if TYPE_CHECKING:
    from deepstack_pl.stacking.plan import Plan

_WHOLE = ("tiles", "llm_layers", "vit_layers", "detail", "pooling")


def last_layer(host: Host, llm_layers: int, vit_layers: int) -> int:
    """The last place before which ``host`` receives: in the tower the selected feature itself."""
    return llm_layers - 1 if host is Host.llm else vit_layers


def check_whole(values: dict[str, Any]) -> None:
    """Refuse a stored plan's numbers that count nothing: a layer 1.5 lies between all layers, and its injection would
    never happen.

    Raises:
        ValueError: naming the value.
    """
    counts = {name: values[name] for name in _WHOLE if name in values}
    counts |= {f"taps[{place}]": tap for place, tap in enumerate(values.get("taps", ()))}
    for kind in ("injections", "dropped"):
        for place, injection in enumerate(values[kind]):
            counts |= {f"{kind}[{place}].{key}": injection[key] for key in ("layer", "group")}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"plan {values.get('name')}: {name} is {value!r}, which is no whole number. Say one.")


def check_place(plan: "Plan", injection: Injection) -> None:
    """Refuse a group that is never dealt, or a layer that is not there.

    Raises:
        ValueError: naming the injection, what there is, and the remedy.
    """
    most = most_groups(plan, injection.source)
    if not 0 <= injection.group < most:
        deals, remedy = {
            Source.tiles: (f"{plan.tiles} tiles ({plan.grid.value}) deal", "raise model.tiles"),
            Source.tap: (f"model.taps={list(plan.taps)} holds", "name more taps"),
            Source.spatial: (f"model.pooling={plan.pooling} joins", "raise model.pooling"),
            Source.detail: (f"model.detail={plan.detail} deals", "raise model.detail"),
            Source.global_view: ("there is but one global view:", "lower model.groups"),
        }[injection.source]
        raise ValueError(
            f"plan {plan.name}: {injection} is its group {injection.group}, but {deals} groups 0 to {most - 1}. Name "
            f"one of these, or {remedy}."
        )
    if not 0 <= injection.layer <= last_layer(injection.host, plan.llm_layers, plan.vit_layers):
        depth = (
            f"the LLM has {plan.llm_layers} layers (0 to {plan.llm_layers - 1})"
            if injection.host is Host.llm
            else f"the tower's feature is read after {plan.vit_layers} blocks (layers 0 to {plan.vit_layers}, the last "
            "the feature itself)"
        )
        raise ValueError(f"plan {plan.name}: {injection}: layers count from 0, and {depth}.")


def check_tap_numbers(taps: Sequence[int], vit_layers: int) -> None:
    """Refuse taps, as a person writes them, beyond the feature or before the first state.

    Raises:
        ValueError: naming them, the depth and the remedy.
    """
    wrong = [tap for tap in taps if not -vit_layers - 1 <= tap <= vit_layers]
    if wrong:
        raise ValueError(
            f"model.taps={list(taps)}: {', '.join(map(str, wrong))} is no hidden state of a tower whose feature is "
            f"read after {vit_layers} blocks. Name 0 to {vit_layers}, or -1 (the feature) to {-vit_layers - 1}."
        )


def check_taps(plan: "Plan") -> None:
    """Refuse taps beyond the feature, and blocks that would run for nothing.

    Raises:
        ValueError: naming the taps, the depth and the remedy.
    """
    wrong = [tap for tap in plan.taps if not 0 <= tap <= plan.vit_layers]
    if wrong:
        raise ValueError(f"plan {plan.name}: taps {wrong} are no states from 0 to {plan.vit_layers}, the feature.")
    if plan.taps and not plan.reads_feature and plan.deepest_tap < plan.vit_layers:
        raise ValueError(
            f"plan {plan.name}: nothing of the feature, read after {plan.vit_layers} blocks, reaches the LLM, and the "
            f"deepest tap is {plan.deepest_tap}: blocks would run for nothing. Set vision.feature_layer="
            f"{plan.deepest_tap}, or model.taps deeper."
        )
