"""The plan: which group enters which host before which layer. Checked against real depths before weights exist.

Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs", 2024,
https://arxiv.org/abs/2406.04334, section 3 and algorithm 1. "Before layer l" is the one convention: Qwen3-VL's
"after layer l" is before l + 1. Loads without torch.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from itertools import pairwise
from math import isqrt
from typing import Any

from deepstack_pl.stacking.config import (
    Collisions,
    Dealing,
    Dealt,
    Encoding,
    GridRule,
    Host,
    Injection,
    ModelConfig,
    Newline,
    Operator,
    Order,
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.places import check_place, check_tap_numbers, check_taps, check_whole, last_layer
from deepstack_pl.stacking.rules import (
    STRINGS,
    WITH_TILES,
    check_injections,
    check_schedule,
    check_views,
    most_tiles,
    reads_global_view,
)
from deepstack_pl.stacking.sketch import sketch


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A validated plan. Build one with `Plan.build`; equal plans have equal digests.

    The values that it shares with `ModelConfig` mean the same.

    Attributes:
        llm_layers: decoder layers of the LLM host; legal layers are ``0 .. llm_layers - 1``.
        vit_layers: number of blocks that run before the tower's feature is read; legal layers are
            ``0 .. vit_layers``, the last being the selected feature itself (method B.4).
        taps: hidden states of the tower that are read besides the feature, 0 to ``vit_layers``, each as it enters its
            block: with what is injected there.
        injections: in the order in which they happen, vision tower first.
        dropped: injections beyond the depth, where the plan says ``overflow: drop``.
    """

    name: str
    tiles: int
    grid: GridRule
    dealing: Dealing
    sequence: Sequence
    llm_layers: int
    vit_layers: int
    resize: Resize = Resize.stretch
    detail: int = 1
    encoding: Encoding = Encoding.separate
    pooling: int = 1
    order: Order = Order.by_group
    unfilled: Unfilled = Unfilled.leave_out
    newline: Newline = Newline.none
    taps: tuple[int, ...] = ()
    injections: tuple[Injection, ...]
    dropped: tuple[Injection, ...] = ()

    def __post_init__(self) -> None:
        """Hold also for a plan that comes from a config.json."""
        check_views(self)
        for injection in self.injections:
            check_place(self, injection)
        twice = sorted({str(i) for i in self.injections if self.injections.count(i) > 1})
        if twice:
            raise ValueError(
                f"plan {self.name}: {', '.join(twice)} stands there more than once. Leave one: see model.injections."
            )
        check_injections(self, self.injections)
        check_taps(self)

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest grid: a square one may hold fewer than ``tiles``."""
        return most_tiles(self)

    @classmethod
    def build(cls, config: ModelConfig, *, llm_layers: int, vit_layers: int) -> "Plan":
        """Resolve and check ``config`` against the depths of both hosts.

        Raises:
            ValueError: an injection without a layer or a group, two on one layer, values that contradict each other.
        """
        check_views(config)
        check_tap_numbers(config.taps, vit_layers)
        check_schedule(config, last_layer(config.host, llm_layers, vit_layers))
        wanted = [
            Injection(
                config.host,
                config.start_layer + k * config.interval,
                0 if config.source is Source.global_view else k,
                config.operator,
                config.source,
            )
            for k in range(config.groups)
        ]
        wanted += [Injection(i.host, i.layer, i.group, i.operator, i.source) for i in config.injections]
        kept: list[Injection] = []
        dropped: list[Injection] = []
        for injection in wanted:
            beyond = injection.layer > last_layer(injection.host, llm_layers, vit_layers)
            (dropped if beyond and config.overflow is Overflow.drop else kept).append(injection)
        kept.sort(key=lambda i: (i.host is Host.llm, i.layer))
        if config.collisions is Collisions.refuse:
            for first, second in pairwise(kept):
                if (first.host, first.layer) == (second.host, second.layer):
                    raise ValueError(
                        f"{first} and {second} meet on one layer. Move one, or say model.collisions=sum to add both."
                    )
        shared = {f.name: getattr(config, f.name) for f in fields(cls) if f.name in _SHARED}
        return cls(
            **shared,
            taps=tuple(vit_layers + 1 + tap if tap < 0 else tap for tap in config.taps),
            llm_layers=llm_layers,
            vit_layers=vit_layers,
            injections=tuple(kept),
            dropped=tuple(dropped),
        )

    def at(self, host: Host) -> dict[int, tuple[Injection, ...]]:
        """The injections of ``host``, by layer."""
        layers: dict[int, tuple[Injection, ...]] = {}
        for injection in self.injections:
            if injection.host is host:
                layers[injection.layer] = (*layers.get(injection.layer, ()), injection)
        return layers

    def groups(self, host: Host) -> tuple[Dealt, ...]:
        """The groups that ``host`` takes, tiles' first: the rows of its index table."""
        taken = {i.dealt for i in self.injections if i.host is host}
        if host is Host.llm and self.sequence is Sequence.channels:
            taken = {(Source.tiles, group) for group in range(self.most_tiles)}
        return tuple(sorted(taken, key=lambda dealt: (list(Source).index(dealt[0]), dealt[1])))

    def gated(self, host: Host) -> tuple[Injection, ...]:
        """The injections of ``host`` that own a learned gate, in order."""
        return tuple(i for i in self.injections if i.host is host and i.operator is Operator.gated_add)

    @property
    def idle_groups(self) -> tuple[int, ...]:
        """Groups of tiles that are dealt but reach no layer and no sequence."""
        if self.sequence in WITH_TILES:
            return ()
        used = {i.group for i in self.injections if i.source is Source.tiles}
        return tuple(k for k in range(self.most_tiles) if k not in used)

    @property
    def idle_taps(self) -> tuple[int, ...]:
        """Taps that reach no layer."""
        used = {i.group for i in self.injections if i.source is Source.tap}
        return tuple(k for k in range(len(self.taps)) if k not in used)

    @property
    def idle_detail(self) -> tuple[int, ...]:
        """Groups of detail that are dealt but reach no layer."""
        used = {i.group for i in self.injections if i.source is Source.detail}
        return tuple(k for k in range(self.detail**2) if k not in used) if self.detail > 1 else ()

    @property
    def tiles_reach_feature(self) -> bool:
        """Whether more than global views runs through the whole tower (for the LLM), not only up to a stack in it."""
        enters = any(source in (Source.tiles, Source.detail) for source, _ in self.groups(Host.llm))
        return self.sequence in WITH_TILES or enters

    @property
    def reads_feature(self) -> bool:
        """Whether the selected feature reaches the LLM: in the text, or in a group that is no tap."""
        return self.sequence is not Sequence.blank or any(s is not Source.tap for s, _ in self.groups(Host.llm))

    @property
    def deepest_tap(self) -> int:
        """The last hidden state that an injection taps, -1 for none."""
        return max((self.taps[i.group] for i in self.injections if i.source is Source.tap), default=-1)

    @property
    def reads_global_view(self) -> bool:
        """Whether the global view reaches the LLM: in the text, or injected."""
        return reads_global_view(self, self.injections)

    def context_tokens(self, tokens_per_view: int) -> int:
        """Most positions that one image takes in the text sequence."""
        if self.sequence not in STRINGS:
            return tokens_per_view
        views = self.most_tiles + (self.sequence is Sequence.global_and_tiles)
        rows = isqrt(self.most_tiles) if self.grid is GridRule.square else self.most_tiles  # of the highest grid
        newlines = 0 if self.newline is Newline.none else rows * isqrt(tokens_per_view)
        return views * tokens_per_view + newlines

    def views(self, tiles: int) -> int:
        """Views of an image with ``tiles`` tiles."""
        return (1 + tiles) * (1 + (self.detail**2 if self.detail > 1 else 0))

    def seen_tokens(self, tokens_per_view: int) -> int:
        """Most visual tokens that one image is read into, by the tower: before pooling."""
        return self.views(self.most_tiles) * tokens_per_view * self.pooling**2

    @property
    def digest(self) -> str:
        """A stable name for what this plan does: its ``name`` does not count, nor do values that plans learned later
        and this one leaves alone.
        """
        unsaid = {f.name: _plain(f.default) for f in fields(self) if f.default is not MISSING and f.name != "dropped"}
        values = {k: v for k, v in self.to_dict().items() if k != "name" and v != unsaid.get(k, MISSING)}
        for key in ("injections", "dropped"):
            values[key] = [{k: v for k, v in i.items() if (k, v) != ("source", "tiles")} for i in values[key]]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        check_whole(values)

        def injections(key: str) -> tuple[Injection, ...]:
            return tuple(
                Injection(
                    Host(i["host"]), i["layer"], i["group"], Operator(i["operator"]), Source(i.get("source", "tiles"))
                )
                for i in values[key]
            )

        enums = {name: kind(values[name]) for name, kind in _ENUMS.items() if name in values}
        plain = {
            name: tuple(value) if name == "taps" else value for name, value in values.items() if name not in _ENUMS
        }
        return cls(**{**plain, **enums, "injections": injections("injections"), "dropped": injections("dropped")})

    def draw(self) -> str:
        """The plan as text, the output on top."""
        return sketch(self)

    def notes(self) -> list[str]:
        """What is dealt for nothing."""
        notes = []
        for what, groups in (
            ("groups", self.idle_groups),
            ("detail groups", self.idle_detail),
            ("taps", self.idle_taps),
        ):
            if groups:
                notes.append(f"dealt but injected nowhere: {what} {', '.join(map(str, groups))}")
        return notes


_ENUMS: dict[str, type[Enum]] = {
    "grid": GridRule,
    "dealing": Dealing,
    "sequence": Sequence,
    "resize": Resize,
    "encoding": Encoding,
    "order": Order,
    "unfilled": Unfilled,
    "newline": Newline,
}
_SHARED = {"name", "tiles", "detail", "pooling", *_ENUMS}  # values that a plan takes over from its ModelConfig


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
