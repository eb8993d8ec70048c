"""What was typed for a Hydra program, and Hydra itself, called with it."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig

# Hydra's flags that take a value: what follows one is no override.
_VALUED = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p")


@dataclass
class CommandLine:
    """Flags and overrides, apart, so that they may be typed in any order."""

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, argv: Sequence[str]) -> "CommandLine":
        line, words = cls(), iter(argv)
        for word in words:
            if not word.startswith("-"):
                line.overrides.append(word)
                continue
            line.flags.append(word)
            if word in _VALUED:
                line.flags += [value for value in [next(words, None)] if value is not None]
        return line

    def value(self, *names: str) -> str | None:
        """The value of a flag, as ``--name VALUE`` or ``--name=VALUE``."""
        for place, word in enumerate(self.flags):
            name, _, value = word.partition("=")
            if name in names:
                return value or (self.flags[place + 1] if place + 1 < len(self.flags) else None)
        return None


def call_hydra(conf: Path, primary: str, words: list[str], job: Callable[[DictConfig], None]) -> None:
    """Compose ``conf/PRIMARY.yaml`` with ``words``, and hand it to ``job``; in a sweep one after another."""

    def composed(config: DictConfig) -> None:
        job(config)

    composed.__name__ = primary  # Hydra's name of the program
    with _argv(words):
        hydra.main(version_base="1.3", config_path=str(conf), config_name=primary)(composed)()


def folders(conf: Path, line: CommandLine) -> tuple[Path, ...]:
    """Where options are read from: the project's conf/, and the user's own folder."""
    own = line.value("--config-dir", "-cd")
    if own is not None and not Path(own).is_dir():
        raise SystemExit(f"--config-dir {own}: there is no such folder.")
    return (conf, Path(own).resolve()) if own else (conf,)


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    """Hydra reads ``sys.argv``, and prints errors itself unless told to hand them on."""
    argv, told = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if told is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = told
