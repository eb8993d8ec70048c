"""What can be said on the command line: the typed keys, the open ones that conf uses, the options of each group."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from deepstack_pl.config.run import RunConfig


class Kind(Enum):
    """What stands under a key."""

    section = "section"  # a dataclass: its keys are all there are
    opened = "opened"  # a dict or a list: conf's keys are known, others may be added with +
    leaf = "leaf"


@dataclass(frozen=True)
class Schema:
    """The typed tree, and the folders that options are read from; the user's own come after the project's."""

    folders: tuple[Path, ...]
    root: type = RunConfig

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Every typed key by its dotted path."""
        return dict(_walk(self.root, ""))

    @cached_property
    def items(self) -> dict[str, type]:
        """What stands under any key of an open section whose values are typed, by that section's path."""
        return dict(_typed_items(self.root, ""))

    def below(self, section: str) -> list[str]:
        """The known keys directly under ``section`` ("": the top), by full path."""
        start = f"{section}." if section else ""
        known = [k for k in self.kinds if k.startswith(start) and "." not in k.removeprefix(start)]
        item = self.items.get(section.rpartition(".")[0])
        if item is not None:
            return [f"{start}{field.name}" for field in fields(item)]
        if section and not known:
            known = [f"{start}{key}" for key in self._written(section)]
        return known

    def groups(self) -> list[str]:
        """Groups of options, by name; ``experiment`` is one."""
        found = {p.name for folder in self.folders for p in folder.iterdir() if p.is_dir() and any(p.glob("*.yaml"))}
        return sorted(found & {*self.below(""), *(("experiment",) if self.root is RunConfig else ())})

    def options(self, group: str) -> list[str]:
        """The options of ``group``, by name; of a tree that shares its groups with a run's, those it has room for."""
        files = {p for folder in self.folders for p in (folder / group).glob("*.yaml")}
        if self.root is not RunConfig:
            room = {key.rpartition(".")[2] for key in self.kinds if key.startswith(f"{group}.")}
            files = {p for p in files if room >= {*_keys(_read(p))}}
        return sorted({p.stem for p in files})

    def files(self, choices: Mapping[str, Any]) -> dict[str, str]:
        """The file of each option in ``choices`` (group: option), where it is one of ours to mend."""
        found = {
            group: folder / group / f"{option}.yaml" for folder in self.folders for group, option in choices.items()
        }
        here = Path.cwd()
        return {
            group: str(file.relative_to(here) if file.is_relative_to(here) else file)
            for group, file in found.items()
            if file.is_file()
        }

    def refuse_namesakes(self) -> None:
        """Hydra takes the first folder's file of a name, and the other one loses in silence.

        Raises:
            ValueError: two folders hold an option of the same name.
        """
        stock, *own = self.folders
        for file in sorted(stock.rglob("*.yaml")):
            for folder in own:
                same = folder / file.relative_to(stock)
                if same.is_file():
                    raise ValueError(
                        f"{same} and {file}: two options of one name, of which Hydra would ignore the first. Give "
                        f"{same} another name."
                    )

    def _written(self, path: str) -> list[str]:
        """Keys that any option, experiment or primary writes under the open section ``path``."""
        group, *rest = path.split(".")
        found: dict[str, None] = {}
        for folder in self.folders:
            for file in [*sorted((folder / group).glob("*.yaml")), *sorted(folder.glob("*.yaml"))]:
                found |= dict.fromkeys(
                    _keys(_select(_read(file), rest if file.parent.name == group else [group, *rest]))
                )
            for file in sorted((folder / "experiment").glob("*.yaml")):
                found |= dict.fromkeys(_keys(_select(_read(file), [group, *rest])))
        return list(found)


def _walk(cls: type, prefix: str) -> Iterable[tuple[str, Kind]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint):
            yield path, Kind.section
            assert isinstance(hint, type)
            yield from _walk(hint, f"{path}.")
        else:
            yield path, Kind.opened if get_origin(hint) in (dict, list) else Kind.leaf


def _typed_items(cls: type, prefix: str) -> Iterable[tuple[str, type]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _typed_items(hint, f"{path}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            yield path, get_args(hint)[1]


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # Hydra will say so, if this file is ever asked for


def _select(tree: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return tree


def _keys(tree: Any) -> list[str]:
    return [str(key) for key in tree if key != "defaults"] if isinstance(tree, Mapping) else []
