"""``ckpt_path=last``, or a run's folder, or one of its checkpoints: go on there, under the run's own saved config.

Handled before Hydra: what the run was composed of is on disk, and today's conf/ may say something else.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from deepstack_pl.cli.folders import CONFIG, RESULTS, checkpoint_of, newest, relative
from deepstack_pl.config.load import load
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.schema import Kind, Schema

# What a run may change on its way: machines, and where things lie. Everything else is the experiment itself.
FREE = (
    "trainer",
    "strategy",
    "logger",
    "callbacks",
    "evaluation",
    "data.root",
    "data.path",
    "data.images",
    "data.shards",
    "data.mixture",  # its roots may move; what it comes to is in the fingerprint
    "data.cache",
    "data.cache_gb",
    "data.workers",
    "data.micro_batch_size",
    "data.max_refused",
    "data.max_cut",
)


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run to go on with."""

    run: RunConfig
    folder: Path
    checkpoint: Path
    results: dict[str, Any]


def asked_for(overrides: Sequence[Override]) -> str | None:
    """The value of ``ckpt_path``, if the command line gives one.

    Raises:
        ValueError: it gives several.
    """
    for o in overrides:
        if o.key_or_group == "ckpt_path" and o.is_sweep_override():
            raise ValueError(f"{o.input_line}: a start goes on with one run. Give them one after the other.")
    values = [o.value() for o in overrides if o.key_or_group == "ckpt_path"]
    return str(values[-1]) if values and values[-1] is not None else None


def prepare(wanted: str, overrides: Sequence[Override], flags: Sequence[str], schema: Schema) -> Resumed:
    """Find the run, and put today's overrides on top of its config.

    Raises:
        ValueError: there is no such run, it is finished, or an override would make it another run.
    """
    if flags:
        raise ValueError(
            f"ckpt_path={wanted} with {' '.join(flags)}: going on takes one run and dotted overrides, nothing else. "
            "Leave the flags out."
        )
    folder = newest() if wanted == "last" else _folder(Path(wanted))
    changes = [_allowed(o, schema, folder) for o in overrides if o.key_or_group != "ckpt_path"]
    run = load(folder / CONFIG, changes)
    file = folder / RESULTS
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    done, steps = results.get("steps", 0), run.trainer["max_steps"]
    if results.get("status") == "finished" and done >= steps:
        raise ValueError(
            f"{relative(folder)} is finished: {done} of {steps} steps. To train on, say trainer.max_steps=MORE (the "
            "learning rate's decay then ends there); to start a new run from its weights, "
            f"init_from={relative(folder)}."
        )
    return Resumed(run, folder, _checkpoint(wanted, folder), results)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps behind ``checkpoint``, by its own count.

    Raises:
        ValueError: it cannot be read.
    """
    return int(_read(checkpoint, "global_step"))


def data_state_of(checkpoint: Path) -> dict[str, Any]:
    """What the datamodule said when ``checkpoint`` was written.

    Raises:
        ValueError: it cannot be read.
    """
    return _read(checkpoint, "DeepStackDataModule")


def _read(checkpoint: Path, name: str) -> Any:
    import torch  # here, because refusals must not wait for it

    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[name]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{relative(checkpoint)} cannot be read as a checkpoint ({first}). Name another, "
            "ckpt_path=RUN/checkpoints/FILE, if the run left one."
        ) from error


def _checkpoint(wanted: str, folder: Path) -> Path:
    """The very file where one is named, else the run's newest."""
    named = Path(wanted)
    if named.suffix != ".ckpt":
        return checkpoint_of(folder)
    if not named.is_file():
        there = ", ".join(file.name for file in sorted(named.parent.glob("*.ckpt"))) or "none"
        raise ValueError(f"ckpt_path={wanted}: there is no such file. Checkpoints of this run: {there}.")
    return named


def _folder(named: Path) -> Path:
    folder = named.parent.parent if named.suffix == ".ckpt" else named
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"ckpt_path={named}: there is no run ({folder / CONFIG} does not exist). Give a run's folder, or last for "
            "the newest one."
        )
    return folder


def _allowed(override: Override, schema: Schema, folder: Path) -> str:
    """``override`` as a dotted assignment, if it leaves the run what it is."""
    key, typed = override.key_or_group, override.input_line
    if override.is_delete() or override.is_sweep_override() or schema.kinds.get(key) is Kind.section or key in FREE[:4]:
        raise ValueError(
            f"{typed} with ckpt_path: a run goes on under its saved config, in which single values may change, such as "
            "trainer.max_steps=600. Write KEY.NAME=VALUE."
        )
    if not any(key == free or key.startswith(f"{free}.") for free in FREE):
        raise ValueError(
            f"{typed} with ckpt_path: {relative(folder)} would no longer be the run it was. Its {key} stays as saved; "
            f"start a new run for another, with init_from={relative(folder)} if it is to begin from these weights."
        )
    return f"{key}={override.get_value_element_as_str()}"
