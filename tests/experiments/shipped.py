"""The experiments of conf/experiment, the points of their sweeps as Hydra expands them, and the pages that show them.

As a script it writes every page of resolved/ anew: `make golden`.
"""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from deepstack_pl.config.load import from_hydra, register
from deepstack_pl.config.run import RunConfig

CONF = Path(__file__).parents[2] / "conf"
PAGES = Path(__file__).parent / "resolved"
Point = tuple[str, ...]  # the overrides of one point of a sweep

register()


def names() -> list[str]:
    """Every shipped experiment; a file whose name starts with ``_`` is only what others have in common."""
    folder = CONF / "experiment"
    files = (file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def header_of(name: str) -> str:
    """The comments that the file starts with, as text."""
    lines = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[1:first])


def command_of(name: str) -> str:
    """The command that its header tells people to type."""
    found = re.search(r"^Command: (.*)$", header_of(name), re.M)
    assert found is not None, f"conf/experiment/{name}.yaml: its header has no '# Command:'"
    return found[1]


def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


@cache
def _whole(name: str) -> tuple[DictConfig, dict[str, str]]:
    """What is composed, and what is swept."""
    config = _composed(f"experiment={name}")
    params = config.hydra.sweeper.get("params") or {}
    with open_dict(config):
        config.pop("hydra")
    return config, {str(key): str(value) for key, value in params.items()}


@cache
def points(name: str) -> tuple[Point, ...]:
    """The points of its sweep; one without overrides where it is none."""
    written = [f"{key}={value}" for key, value in _whole(name)[1].items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(written), None)
    return tuple(tuple(point) for point in batch)


def chooses(point: Point) -> bool:
    """Whether it chooses an option, so that all must be composed anew (a fifth of a second)."""
    return any((CONF / override.partition("=")[0]).is_dir() for override in point)


@cache
def run_of(name: str, point: Point) -> RunConfig:
    """What the point runs; not to be changed. Values alone are put on what was composed, by Hydra's own hand."""
    parsed = OverridesParser.create().parse_overrides(list(point))
    if chooses(point):
        config = _composed(f"experiment={name}", *point)
        with open_dict(config):
            config.pop("hydra")
    else:
        config = deepcopy(_whole(name)[0])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    return from_hydra(config)


def page(name: str, *, whole: bool = True) -> str:
    """The command, every value of the run by its full key, and, where it is ``whole``, what each point of a sweep
    changes.
    """
    base = _flat(run_of(name, ()))
    text = f"# {command_of(name)}\n# Written by `make golden`.\n" + _lines(base)
    if points(name) == ((),):
        return text
    text += f"points:  # {len(points(name))}; what each changes\n"
    for point in points(name) if whole else ():
        its = _flat(run_of(name, point))
        apart = [key for key in sorted(base.keys() | its.keys()) if its.get(key) != base.get(key)]
        changed = {key: its.get(key, "none here") for key in apart}
        text += f"- {' '.join(point)}:\n{_lines(changed, '    ')}" if changed else f"- {' '.join(point)}: as above\n"
    return text


def page_of(name: str) -> Path:
    return PAGES / f"{name.replace('/', '__')}.yaml"


def _flat(run: RunConfig) -> dict[str, str]:
    """Its values by full key, as YAML writes them on one line; enums by name."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for name, each in value.items():
                yield from walk(each, f"{key}.{name}" if key else str(name))
        else:
            yield key, json.dumps(value, default=lambda enum: enum.name)

    return dict(walk(asdict(run), ""))


def _lines(values: dict[str, str], indent: str = "") -> str:
    return "".join(f"{indent}{key}: {value}\n" for key, value in values.items())


def rewrite() -> None:
    """Write every page, and remove those of experiments that are no more."""
    PAGES.mkdir(exist_ok=True)
    wanted = {page_of(name): page(name) for name in names()}
    for file in set(PAGES.glob("*.yaml")) - wanted.keys():
        file.unlink()
    for file, text in wanted.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
