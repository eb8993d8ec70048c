"""What a sweep found: one table over its arms, and whether the comparison was fair. Loads without torch."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deepstack_pl.cli.arms import fairness, read_arms, state
from deepstack_pl.cli.folders import discard_if_empty, relative
from deepstack_pl.cli.points import WORDS, is_dry, remember_words, words_of
from deepstack_pl.cli.report import duration, interval_of, share
from deepstack_pl.files import write_text

_HEAD = ("arm", "context tokens", "seen tokens", "parameters", "training")


class SweepReport(Callback):
    """Keeps in ``sweep.json`` how the sweep was started; writes it and the report when the last arm is done.

    Attributes:
        arms: those of this process's newest sweep; other processes may have run them.
        failed: its report could not be written.
    """

    arms: ClassVar[list[dict[str, Any]]] = []
    failed: ClassVar[bool] = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not is_dry(config):
            typed = [word for word in sys.argv[1:] if not word.startswith("hydra.job.config.override_dirname.")]
            remember_words(Path(config.hydra.sweep.dir), typed)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        console = Console()
        folder = Path(config.hydra.sweep.dir)
        SweepReport.arms = read_arms(folder)
        try:
            report(folder, console if console.is_terminal else Console(width=140))
        except Exception:  # Hydra would make a warning of it, and the sweep a success
            traceback.print_exc()
            SweepReport.failed = True


def report(folder: Path, console: Console) -> None:
    """Read the arms in ``folder``, and print and write what they found."""
    arms = read_arms(folder)
    if not arms:  # a dry run leaves nothing, Hydra's own file included
        if (folder / WORDS).is_file():
            return
        (folder / "multirun.yaml").unlink(missing_ok=True)
        discard_if_empty(folder)
        return
    checks = fairness(arms)
    console.print(table(arms))
    for line in checks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    found = {"words": words_of(folder), "arms": arms, "checks": checks}
    write_text(folder / WORDS, json.dumps(found, indent=2) + "\n")
    if any(state(arm) == "finished" for arm in arms):
        ends = [*_page(folder), f"sweep: {relative(folder)}  (report.html, report.md, {WORDS})"]
    else:
        write_text(folder / "report.md", "\n".join([f"# {folder.name}", "", *(f"- {line}" for line in checks), ""]))
        ends = [f"sweep: {relative(folder)}  (report.md, {WORDS})"]
    if any(state(arm) != "finished" for arm in arms):
        ends.append(f"To go on, finished points left as they are: python train.py ckpt_path={relative(folder)}")
    for line in ends:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _page(folder: Path) -> list[str]:
    """Write the sweep's page; what it says of each arm."""
    from deepstack_pl.cli.study import read_study  # here, because figures must not delay a run's first words
    from deepstack_pl.cli.study_page import comparisons, write_page

    study = read_study([folder])
    write_page(study, folder)
    return comparisons(study)


def kinds(arms: list[dict[str, Any]]) -> list[str]:
    """Every kind of fact that an arm reports."""
    return sorted({kind for arm in arms for kind in arm.get("metrics", {})})


def cells(arm: dict[str, Any], columns: list[str]) -> list[str]:
    """One row: the arm, its accuracy by kind, its cost. An arm without a report says so in its row."""
    metrics = arm.get("metrics")
    if not metrics or state(arm) not in ("finished", "interrupted"):
        return [arm["name"], *(state(arm) for _ in columns), "", "", "", ""]
    found = [share(metrics[k]["accuracy"], interval_of(metrics[k])) if k in metrics else "" for k in columns]
    if arm["status"] == "interrupted":
        found = [f"{text} at step {arm['steps']}" for text in found]
    tokens, parameters = arm["tokens_per_image"], arm["parameters"]
    cost = [f"{tokens['context']}", f"{tokens['seen']}", f"{parameters['total']:,}", duration(arm["seconds"]["train"])]
    return [arm["name"], *found, *cost]


def table(arms: list[dict[str, Any]]) -> Table:
    """For a terminal."""
    columns = kinds(arms)
    drawn = Table(title=f"{len(arms)} arms: accuracy with intervals, and what it costs")
    for name in (_HEAD[0], *columns, *_HEAD[1:]):
        drawn.add_column(name, justify="left" if name == _HEAD[0] else "right", no_wrap=name == _HEAD[0])
    for arm in arms:
        drawn.add_row(*cells(arm, columns), style=None if arm["status"] == "finished" else "red")
    return drawn
