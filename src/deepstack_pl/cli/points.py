"""A point of a sweep whose folder is there already: finished, to be gone on with, or to be begun anew.

A sweep is gone on with by its own command line, which it keeps (`remember_words`), in its own folder.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from deepstack_pl.cli.folders import CONFIG, alone, checkpoint_of, relative
from deepstack_pl.cli.report import read_results
from deepstack_pl.cli.resume import FREE, Resumed
from deepstack_pl.config.load import flat, load
from deepstack_pl.config.run import RunConfig
from deepstack_pl.files import write_text

WORDS = "sweep.json"
_DECIDES = ("trainer.max_steps", "evaluation")  # of what a run may change on its way, what decides its numbers
_SETTLED = ("data.epochs", "trainer.max_steps")  # a run of so many epochs saves its steps instead
_OF_ONE_START = ("ckpt_path", "dry_run")


class AnotherRun(ValueError):
    """A point's folder holds a run that is not it; nothing there may be touched."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a point has come.

    Attributes:
        resumed: what to go on with; None where it is new, or finished.
        aside: where what it had left, without a checkpoint, was put.
    """

    finished: bool = False
    resumed: Resumed | None = None
    aside: Path | None = None


def standing(run: RunConfig, folder: Path) -> Standing:
    """Look at what ``folder`` holds of the point ``run``; what is of no use is put aside, beside it.

    Raises:
        AnotherRun: one of other values.
        Live: another process trains there.
    """
    file = folder / CONFIG
    if not file.is_file():
        return Standing()
    saved = load(file, [])
    apart = list(differences(run, saved))
    if apart:
        raise AnotherRun(
            f"{relative(folder)} holds a run of other values: {'; '.join(apart[:3])}. Its sweep goes on with what it "
            "was begun with. Put conf/ back as it was, or start another sweep."
        )
    if read_results(folder).get("status") == "finished":
        return Standing(finished=True)
    with alone(folder):  # so that none begins in what is put aside
        results = read_results(folder)
        try:
            checkpoint, notes = checkpoint_of(folder)
        except ValueError:
            return Standing(aside=_put_aside(folder))
    if run.data.epochs is not None:
        run.data.epochs, run.trainer["max_steps"] = None, saved.trainer["max_steps"]
    return Standing(resumed=Resumed(run, folder, checkpoint.folder, results, False, tuple(notes)))


def differences(run: RunConfig, saved: RunConfig) -> Iterator[str]:
    """In what ``saved``, as a run leaves its config, is another experiment than ``run``, as it was composed."""
    new, old = flat(run), flat(saved)
    for key in sorted(new.keys() | old.keys()):
        machine = any(_is_in(key, free) for free in FREE) and not any(_is_in(key, its) for its in _DECIDES)
        settled = run.data.epochs is not None and key in _SETTLED
        drawn = key == "llm.template" and run.llm.checkpoint is not None  # settled where weights are random
        if new.get(key) != old.get(key) and not (machine or settled or drawn or key in _OF_ONE_START):
            yield f"{key} was {old.get(key)}, and is {new.get(key)}"


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _put_aside(folder: Path) -> Path:
    """Rename ``folder`` to a hidden one: no report counts it as a point, and nothing is lost."""
    number = 1
    while (aside := folder.with_name(f".{folder.name}.before-{number}")).exists():
        number += 1
    return folder.rename(aside)


def remember_words(folder: Path, words: Sequence[str]) -> None:
    """Write into a new sweep's ``folder`` what it was started with; one that goes on keeps what it found."""
    if not (folder / WORDS).is_file():
        write_text(folder / WORDS, json.dumps({"words": list(words), "arms": [], "checks": []}, indent=2) + "\n")


def words_of(folder: Path) -> list[str] | None:
    """What the sweep in ``folder`` was started with; None where it is none, or of before that was kept."""
    file = folder / WORDS
    return json.loads(file.read_text(encoding="utf-8")).get("words") if file.is_file() else None


def is_dry(config: DictConfig) -> bool:
    """Whether nothing but the terminal will hear of it."""
    return str(config.get("dry_run")).lower() != "false"
