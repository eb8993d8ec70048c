"""The plan: which group enters which host before which layer. Checked against real depths before weights exist.

Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs", 2024,
https://arxiv.org/abs/2406.04334, section 3 and algorithm 1. "Before layer l" is the one convention: Qwen3-VL's
"after layer l" is before l + 1. Loads without torch.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from math import isqrt
from typing import Any

from deepstack_pl.stacking.config import (
    Collisions,
    Dealing,
    GridRule,
    Host,
    ModelConfig,
    Operator,
    Overflow,
    Sequence,
)


@dataclass(frozen=True, slots=True)
class Injection:
    """``group`` is added to ``host``'s residual stream before ``layer``."""

    host: Host
    layer: int
    group: int
    operator: Operator = Operator.add

    def __str__(self) -> str:
        gate = ", gated" if self.operator is Operator.gated_add else ""
        return f"group {self.group} -> {self.host.value} layer {self.layer}{gate}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated plan. Build one with `Plan.build`; equal plans have equal digests.

    Attributes:
        tiles: largest number of tiles an image becomes (0: the global view alone).
        llm_layers: decoder layers of the LLM host; legal layers are ``0 .. llm_layers - 1``.
        vit_layers: number of blocks that run before the tower's feature is read; legal layers are
            ``0 .. vit_layers``, the last being the selected feature itself (method B.4).
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
    injections: tuple[Injection, ...]
    dropped: tuple[Injection, ...] = ()

    def __post_init__(self) -> None:
        """Hold also for a plan that comes from a config.json."""
        for injection in self.injections:
            self._check(injection)
        twice = sorted({str(i) for i in self.injections if self.injections.count(i) > 1})
        if twice:
            raise ValueError(f"plan {self.name}: {', '.join(twice)} stands there more than once. Leave one.")

    def _check(self, injection: Injection) -> None:
        if not 0 <= injection.group < self.most_tiles:
            raise ValueError(
                f"plan {self.name}: {injection}: {self.tiles} tiles ({self.grid.value}) deal groups 0 to "
                f"{self.most_tiles - 1}. Name one of these, or raise model.tiles."
            )
        if not 0 <= injection.layer <= _last_layer(injection.host, self.llm_layers, self.vit_layers):
            depth = _depth(injection.host, self.llm_layers, self.vit_layers)
            raise ValueError(f"plan {self.name}: {injection}: layers count from 0, and {depth}.")

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest grid: a square one may hold fewer than ``tiles``."""
        return isqrt(self.tiles) ** 2 if self.grid is GridRule.square else self.tiles

    @classmethod
    def build(cls, config: ModelConfig, *, llm_layers: int, vit_layers: int) -> "Plan":
        """Resolve and check ``config`` against the depths of both hosts.

        Raises:
            ValueError: an injection without a layer or a group, two on one layer, impossible tiles.
        """
        _check_tiles(config)
        wanted = [
            Injection(config.host, config.start_layer + k * config.interval, k, config.operator)
            for k in range(config.groups)
        ]
        _check_schedule(config, wanted, _last_layer(config.host, llm_layers, vit_layers))
        wanted += [Injection(i.host, i.layer, i.group, i.operator) for i in config.injections]
        kept: list[Injection] = []
        dropped: list[Injection] = []
        for injection in wanted:
            beyond = injection.layer > _last_layer(injection.host, llm_layers, vit_layers)
            (dropped if beyond and config.overflow is Overflow.drop else kept).append(injection)
        kept.sort(key=lambda i: (i.host is Host.llm, i.layer))
        if config.collisions is Collisions.refuse:
            for first, second in pairwise(kept):
                if (first.host, first.layer) == (second.host, second.layer):
                    raise ValueError(
                        f"{first} and {second} meet on one layer. Move one, or say model.collisions=sum to add both."
                    )
        return cls(
            name=config.name,
            tiles=config.tiles,
            grid=config.grid,
            dealing=config.dealing,
            sequence=config.sequence,
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

    def groups(self, host: Host) -> tuple[int, ...]:
        """The groups that enter ``host``, ascending: the rows of its index table."""
        return tuple(sorted({i.group for i in self.injections if i.host is host}))

    def gated(self, host: Host) -> tuple[Injection, ...]:
        """The injections of ``host`` that own a learned gate, in order."""
        return tuple(i for i in self.injections if i.host is host and i.operator is Operator.gated_add)

    @property
    def idle_groups(self) -> tuple[int, ...]:
        """Groups that are dealt but reach no layer and no sequence."""
        if not self.tiles or self.sequence is Sequence.global_and_tiles:
            return ()
        used = {i.group for i in self.injections}
        return tuple(k for k in range(self.most_tiles) if k not in used)

    @property
    def tiles_reach_feature(self) -> bool:
        """Whether tiles run through the whole tower (for the LLM), not only up to a stack inside it."""
        return self.sequence is Sequence.global_and_tiles or bool(self.groups(Host.llm))

    def context_tokens(self, tokens_per_view: int) -> int:
        """Most positions that one image takes in the text sequence."""
        views = 1 + self.most_tiles if self.sequence is Sequence.global_and_tiles else 1
        return views * tokens_per_view

    def seen_tokens(self, tokens_per_view: int) -> int:
        """Most visual tokens that one image is read into."""
        return (1 + self.most_tiles) * tokens_per_view

    @property
    def digest(self) -> str:
        """A stable name for what this plan does (its ``name`` does not count)."""
        values = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""

        def injections(key: str) -> tuple[Injection, ...]:
            return tuple(
                Injection(Host(i["host"]), i["layer"], i["group"], Operator(i["operator"])) for i in values[key]
            )

        return cls(
            name=values["name"],
            tiles=values["tiles"],
            grid=GridRule(values["grid"]),
            dealing=Dealing(values["dealing"]),
            sequence=Sequence(values["sequence"]),
            llm_layers=values["llm_layers"],
            vit_layers=values["vit_layers"],
            injections=injections("injections"),
            dropped=injections("dropped"),
        )

    def draw(self) -> str:
        """The plan as text, the output on top."""
        rows = [f"plan {self.name} ({self.digest})", ""]
        for host, last in ((Host.llm, self.llm_layers - 1), (Host.vit, self.vit_layers)):
            layers = self.at(host)
            for layer in range(last, -1, -1):
                feature = host is Host.vit and layer == last
                label = "feature " if feature else f"{'layer' if host is Host.llm else 'block'} {layer:2}"
                arrows = "".join(
                    f" <- group {i.group}{' (gated)' if i.operator is Operator.gated_add else ''}"
                    for i in layers.get(layer, ())
                )
                rows.append(f"  {host.name} {label} |{arrows}")
            rows.append(f"  {'text and ' + self._sequence_text() if host is Host.llm else self._views_text()}")
            rows.append("")
        if not self.injections:
            rows.append("  no injections: nothing is stacked")
        rows += [f"  dropped beyond the depth: {i}" for i in self.dropped]
        if self.idle_groups:
            rows.append(f"  dealt but injected nowhere: groups {', '.join(map(str, self.idle_groups))}")
        return "\n".join(rows).rstrip()

    def _sequence_text(self) -> str:
        return "global view" if self.sequence is Sequence.global_view else f"global view and {self.tiles} groups"

    def _views_text(self) -> str:
        if not self.tiles:
            return "global view"
        return f"global view and up to {self.tiles} tiles ({self.grid.value}), dealt {self.dealing.value}"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _most_groups(config: ModelConfig) -> int:
    return isqrt(config.tiles) ** 2 if config.grid is GridRule.square else config.tiles


def _last_layer(host: Host, llm_layers: int, vit_layers: int) -> int:
    return llm_layers - 1 if host is Host.llm else vit_layers


def _depth(host: Host, llm_layers: int, vit_layers: int) -> str:
    if host is Host.llm:
        return f"the LLM has {llm_layers} layers (0 to {llm_layers - 1})"
    return (
        f"the tower's feature is read after {vit_layers} blocks (layers 0 to {vit_layers}, the last the feature itself)"
    )


def _check_tiles(config: ModelConfig) -> None:
    if config.tiles < 0 or config.groups < 0 or config.start_layer < 0 or config.interval < 1:
        raise ValueError(
            f"model.tiles={config.tiles}, model.groups={config.groups}, model.start_layer={config.start_layer}, "
            f"model.interval={config.interval}: the first three cannot be negative, interval must be at least 1."
        )
    if config.tiles == 1 and config.grid is GridRule.best_fit:
        raise ValueError("model.tiles=1: best_fit has no grid of one tile (1x1 is excluded). Use 0, or 2 and more.")
    if config.sequence is Sequence.global_and_tiles and not config.tiles:
        raise ValueError("model.sequence=global_and_tiles needs tiles: set model.tiles to 2 or more.")


def _check_schedule(config: ModelConfig, wanted: list[Injection], last: int) -> None:
    most = _most_groups(config)
    if config.groups > most:
        raise ValueError(
            f"model.groups={config.groups}, but {config.tiles} tiles ({config.grid.value}) deal at most {most} groups. "
            "Lower `model.groups` or raise `model.tiles`."
        )
    reached = wanted[-1].layer if wanted else 0
    if wanted and reached > last and config.overflow is Overflow.refuse:
        depth = (
            f"the LLM has {last + 1} layers"
            if config.host is Host.llm
            else f"the tower's feature is read after {last} blocks, so {last} is the last place"
        )
        raise ValueError(
            f"{config.groups} groups from layer {config.start_layer}, one every {config.interval}, reach layer "
            f"{reached}, but {depth}. Lower `model.start_layer`, `model.interval` or `model.groups`."
        )
