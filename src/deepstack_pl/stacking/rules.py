"""What no plan can mean: values of the ``model`` group that contradict each other. Loads without torch.

Every rule looks at values alone, so that a plan from a config.json is held to them as much as one from conf.
"""

from collections.abc import Sequence as Several
from math import isqrt
from typing import Protocol, runtime_checkable

from deepstack_pl.stacking.config import (
    Collisions,
    Encoding,
    GridRule,
    Host,
    Injection,
    ModelConfig,
    Newline,
    Order,
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)

MOST_TILES = 1024
WITH_TILES = (Sequence.global_and_tiles, Sequence.tiles, Sequence.channels)  # sequences that need tiles
ALIGNED = (Source.tap, Source.spatial)  # sources that lie token by token under the text sequence
STRINGS = (Sequence.global_and_tiles, Sequence.tiles)  # sequences in which tiles follow each other


@runtime_checkable  # the tests check signatures
class Values(Protocol):
    """What a `ModelConfig` and a `Plan` have in common."""

    @property
    def tiles(self) -> int: ...
    @property
    def grid(self) -> GridRule: ...
    @property
    def resize(self) -> Resize: ...
    @property
    def detail(self) -> int: ...
    @property
    def encoding(self) -> Encoding: ...
    @property
    def pooling(self) -> int: ...
    @property
    def taps(self) -> Several[int]: ...
    @property
    def sequence(self) -> Sequence: ...
    @property
    def order(self) -> Order: ...
    @property
    def unfilled(self) -> Unfilled: ...
    @property
    def newline(self) -> Newline: ...


def most_tiles(values: Values) -> int:
    """Tiles of the largest grid: a square one may hold fewer than ``tiles``."""
    return isqrt(values.tiles) ** 2 if values.grid is GridRule.square else values.tiles


def most_groups(values: Values, source: Source) -> int:
    """Groups that ``source`` deals at most."""
    if source is Source.tiles:
        return most_tiles(values)
    return {Source.tap: len(values.taps), Source.spatial: values.pooling**2, Source.detail: values.detail**2}.get(
        source, 1
    )


def check_views(values: Values) -> None:
    """Refuse views and sequences that cannot be.

    Raises:
        ValueError: naming the values, the rule and the remedy.
    """
    if values.tiles < 0 or values.detail < 1 or values.pooling < 1:
        raise ValueError(
            f"model.tiles={values.tiles}, model.detail={values.detail}, model.pooling={values.pooling}: tiles cannot "
            "be negative, the other two must be at least 1."
        )
    if values.tiles > MOST_TILES:
        raise ValueError(
            f"model.tiles={values.tiles}: an image becomes at most {MOST_TILES:,} tiles: every grid of them is "
            "tried. Lower `model.tiles`."
        )
    if values.tiles == 1 and values.grid is GridRule.best_fit:
        raise ValueError("model.tiles=1: best_fit has no grid of one tile (1x1 is excluded). Use 0, or 2 and more.")
    if values.sequence in WITH_TILES and not values.tiles:
        raise ValueError(f"model.sequence={values.sequence.name} needs tiles: set model.tiles to 2 or more.")
    _check_sequence(values)
    if values.resize is Resize.letterbox and (not values.tiles or values.detail > 1):
        raise ValueError(
            f"model.resize=letterbox with model.tiles={values.tiles} and model.detail={values.detail}: tiles are "
            "letter-boxed, and detail is cut from plain stretches. Say model.resize=stretch."
        )
    if values.encoding is Encoding.one_pass and not (
        values.tiles and values.grid is GridRule.square and values.detail == 1
    ):
        raise ValueError(
            f"model.encoding=one_pass with model.tiles={values.tiles}, model.grid={values.grid.name} and model.detail="
            f"{values.detail}: there must be tiles to enlarge, and enlarged images must be equally large. Say "
            "model.tiles=4 model.grid=square model.detail=1."
        )


def _check_sequence(values: Values) -> None:
    """Settings of the sequence that would be ignored, or that no position could follow."""
    sequence = values.sequence
    if values.order is Order.raster and sequence not in STRINGS:
        raise ValueError(
            f"model.order=raster orders the tiles of a text sequence, but model.sequence={sequence.name} has none. Say "
            "model.order=by_group, or model.sequence=global_and_tiles."
        )
    if values.unfilled is Unfilled.zeros and (sequence not in STRINGS or values.order is Order.raster):
        raise ValueError(
            f"model.unfilled=zeros fills up groups that follow each other, but model.sequence={sequence.name} in "
            f"model.order={values.order.name} has none. Say model.unfilled=leave_out."
        )
    if values.newline is not Newline.none and values.order is not Order.raster:
        raise ValueError(
            f"model.newline={values.newline.name} ends the mosaic's rows, but model.order={values.order.name} writes "
            "groups. Say model.order=raster, or model.newline=none."
        )
    if sequence is Sequence.channels and values.pooling > 1:
        raise ValueError(
            f"model.pooling={values.pooling} averages projected tokens, but model.sequence=channels projects last. Say "
            "model.pooling=1."
        )


def reads_global_view(values: Values, injections: Several[Injection]) -> bool:
    """Whether the feature of global views reaches the LLM: in the text, or injected. A tap reads another state."""
    again = any(i.host is Host.llm and i.source in (Source.global_view, Source.spatial) for i in injections)
    return again or values.sequence not in (Sequence.tiles, Sequence.blank)


def check_injections(values: Values, injections: Several[Injection]) -> None:
    """Refuse injections that have no position, or nothing to add.

    Raises:
        ValueError: naming the injection, the rule and the remedy.
    """
    sequence = values.sequence
    for injection in injections:
        if injection.source is Source.detail:
            _check_detail(values, injection)
        elif injection.source in ALIGNED:
            _check_aligned(values, injection)
        elif injection.host is Host.llm and sequence in (Sequence.tiles, Sequence.channels):
            raise ValueError(
                f"{injection}: with model.sequence={sequence.name} no position in the text is a global view's, where "
                "it would be added. Say model.groups=0, or another model.sequence."
            )
        if injection.host is Host.vit and values.encoding is Encoding.one_pass:
            raise ValueError(
                f"{injection}: with model.encoding=one_pass the tower never sees tiles by themselves. Say "
                "model.encoding=separate, or model.host=llm."
            )
        taken = max((values.taps[i.group] for i in injections if i.source is Source.tap), default=-1)
        if injection.host is Host.vit and taken < injection.layer and not reads_global_view(values, injections):
            raise ValueError(
                f"{injection}: with model.sequence={sequence.name} nothing of the global view, to which the tower adds "
                "it, reaches the LLM. Say model.sequence=global_view, or inject the global view too."
            )
    in_use = sequence in WITH_TILES or any(i.source is Source.tiles for i in injections)
    if values.encoding is Encoding.one_pass and not in_use:
        raise ValueError(
            "model.encoding=one_pass, but no tile stands in the text or is injected: the pass would be for nothing. "
            "Say model.encoding=separate."
        )
    if sequence is Sequence.blank and all(i.host is not Host.llm for i in injections):
        raise ValueError(
            "model.sequence=blank without an injection into the LLM: it would never see the image. Inject something, "
            "or say model.sequence=global_view."
        )
    if values.newline is Newline.rows_and_groups and all(i.source is not Source.detail for i in injections):
        raise ValueError(
            "model.newline=rows_and_groups adds newlines with groups of detail, but none is injected. Say "
            "model.newline=rows, or model.source=detail."
        )


def _check_aligned(values: Values, injection: Injection) -> None:
    if injection.host is Host.vit or values.sequence in (Sequence.tiles, Sequence.channels):
        raise ValueError(
            f"{injection}: it stands under the tokens of the text sequence; it enters the LLM, with model.sequence="
            "global_view, global_and_tiles or blank."
        )
    if values.encoding is Encoding.one_pass or (injection.source is Source.spatial and values.pooling < 2):
        raise ValueError(
            f"{injection} with model.encoding={values.encoding.name} and model.pooling={values.pooling}: views must be "
            "read one by one (model.encoding=separate), and squares hold several tokens (model.pooling=2)."
        )


def _check_detail(values: Values, injection: Injection) -> None:
    if values.detail < 2:
        raise ValueError(f"{injection}: model.detail=1 cuts no detail. Set model.detail to 2 or more.")
    if injection.host is Host.vit or values.sequence not in (Sequence.global_view, Sequence.global_and_tiles):
        raise ValueError(
            f"{injection}: detail is laid out like the text sequence, view by view; it enters the LLM, with "
            "model.sequence=global_view or global_and_tiles."
        )


def check_schedule(config: ModelConfig, last: int) -> None:
    """Refuse a schedule without groups to inject or layers to inject before; ``last`` is the host's last place.

    Raises:
        ValueError: naming both numbers, the rule and the remedy.
    """
    if config.groups < 0 or config.start_layer < 0 or config.interval < 0:
        raise ValueError(
            f"model.groups={config.groups}, model.start_layer={config.start_layer}, model.interval={config.interval}: "
            "none can be negative."
        )
    if config.groups > 1 and not config.interval and config.collisions is Collisions.refuse:
        raise ValueError(
            f"model.interval=0 adds all {config.groups} groups before layer {config.start_layer}. Say "
            "model.collisions=sum as well if that is meant, or model.interval=1."
        )
    most = most_groups(config, config.source)
    if config.groups > most and config.source is Source.tiles:
        raise ValueError(
            f"model.groups={config.groups}, but {config.tiles} tiles ({config.grid.value}) deal at most {most} groups. "
            "Lower `model.groups` or raise `model.tiles`."
        )
    if config.groups > most and config.source is Source.tap:
        raise ValueError(
            f"model.groups={config.groups}, but model.taps={list(config.taps)} reads {most} hidden states. Lower "
            "`model.groups` or name more taps."
        )
    if config.groups > most and config.source is Source.spatial:
        raise ValueError(
            f"model.groups={config.groups}, but model.pooling={config.pooling} joins squares of {most} tokens. Lower "
            "`model.groups` or raise `model.pooling`."
        )
    if config.groups > most and config.source is Source.detail:
        raise ValueError(
            f"model.groups={config.groups}, but model.detail={config.detail} deals {most} groups of every view. Lower "
            "`model.groups` or raise `model.detail`."
        )
    reached = config.start_layer + (config.groups - 1) * config.interval
    if config.groups and reached > last and config.overflow is Overflow.refuse:
        depth = (
            f"the LLM has {last + 1} layers"
            if config.host is Host.llm
            else f"the tower's feature is read after {last} blocks, so {last} is the last place"
        )
        raise ValueError(
            f"{config.groups} groups from layer {config.start_layer}, one every {config.interval}, reach layer "
            f"{reached}, but {depth}. Lower `model.start_layer`, `model.interval` or `model.groups`."
        )
