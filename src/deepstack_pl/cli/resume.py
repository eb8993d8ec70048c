"""``ckpt_path=last``, or a run's folder, or one of its checkpoints: go on there, under the run's own saved config.

Handled before Hydra: what the run was composed of is on disk, and today's conf/ may say something else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from deepstack_pl.cli.folders import CHECKPOINTS, CONFIG, RESULTS, checkpoint_of, newest, relative
from deepstack_pl.config.load import load
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.schema import Kind, Schema
from deepstack_pl.training.checkpoints import Checkpoint, all_of, verify

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
    """A run to go on with.

    Attributes:
        checkpoint: a folder; what it holds is verified where it is read.
        named: the user named this very checkpoint: no other will do.
        notes: what is to be said of newer ones that were passed over.
    """

    run: RunConfig
    folder: Path
    checkpoint: Path
    results: dict[str, Any]
    named: bool = False
    notes: tuple[str, ...] = ()


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
    checkpoint, notes = _checkpoint(wanted, folder)
    return Resumed(run, folder, checkpoint.folder, results, _names_checkpoint(Path(wanted)), tuple(notes))


def whole(resumed: Resumed) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to go on from, every byte of it verified, and a sentence for each newer one passed over. All
    processes must call it: each looks at a part of the files.

    Raises:
        ValueError: none is whole, or the one that was named is not.
    """
    from deepstack_pl.processes import from_all, rank, world  # here, because refusals must not wait for torch

    passed: list[str] = []
    for checkpoint in all_of(resumed.folder / CHECKPOINTS):
        if resumed.named and checkpoint.folder.name != resumed.checkpoint.name:
            continue
        problems = {p for each in from_all(verify(checkpoint, share=(rank(), world()))) for p in each}
        if not problems:
            return checkpoint, passed
        passed.append(f"{relative(checkpoint.folder)} is damaged and passed over: {'; '.join(sorted(problems)[:3])}.")
    raise ValueError(
        f"{relative(resumed.folder)} holds no checkpoint that is whole. {' '.join(passed)} Start a new run, or from "
        "other weights with init_from."
    )


def how_to_go_on(folder: Path) -> str | None:
    """What is to be said where a run in ``folder`` ends before its time; None where it has saved nothing to its end."""
    try:
        back = checkpoint_of(folder)[0].step
    except ValueError:
        return None
    return f"To go on from step {back}, the newest checkpoint's: python train.py ckpt_path={relative(folder)}"


def _checkpoint(wanted: str, folder: Path) -> tuple[Checkpoint, list[str]]:
    """The very one that is named, else the run's newest; sizes are looked at."""
    named = Path(wanted)
    if not _names_checkpoint(named):
        return checkpoint_of(folder)
    there = {checkpoint.folder.name: checkpoint for checkpoint in all_of(folder / CHECKPOINTS)}
    if named.name not in there:
        raise ValueError(
            f"ckpt_path={wanted}: there is no such checkpoint. Those of this run: {', '.join(there) or 'none'}."
        )
    problems = verify(there[named.name], deep=False)
    if problems:
        raise ValueError(
            f"ckpt_path={wanted} is damaged: {'; '.join(problems[:3])}. Name another of this run: {', '.join(there)}."
        )
    return there[named.name], []


def _names_checkpoint(named: Path) -> bool:
    """Whether it is RUN/checkpoints/step-N and not RUN."""
    return named.parent.name == CHECKPOINTS


def _folder(named: Path) -> Path:
    folder = named.parent.parent if _names_checkpoint(named) else named
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
        example = f"strategy.kind={override.value()}" if key == "strategy" else "trainer.max_steps=600"
        raise ValueError(
            f"{typed} with ckpt_path: a run goes on under its saved config, in which single values may change, such as "
            f"{example}. Write KEY.NAME=VALUE."
        )
    if not any(key == free or key.startswith(f"{free}.") for free in FREE):
        raise ValueError(
            f"{typed} with ckpt_path: {relative(folder)} would no longer be the run it was. Its {key} stays as saved; "
            f"start a new run for another, with init_from={relative(folder)} if it is to begin from these weights."
        )
    return f"{key}={override.get_value_element_as_str()}"
