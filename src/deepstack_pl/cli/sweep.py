"""What a sweep found: one table over its arms, and whether the comparison was fair. Loads without torch."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deepstack_pl.cli.folders import RESULTS, relative, write_text
from deepstack_pl.cli.report import duration, interval_of, share

_HEAD = ("arm", "context tokens", "seen tokens", "parameters", "training")


class SweepReport(Callback):
    """Writes ``sweep.json`` and ``report.md`` beside the arms when the last one is done."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        console = Console()
        report(Path(config.hydra.sweep.dir), console if console.is_terminal else Console(width=140))


def report(folder: Path, console: Console) -> None:
    """Read the arms in ``folder``, and print and write what they found."""
    arms = read_arms(folder)
    if not arms:
        return
    checks = fairness(arms)
    console.print(table(arms))
    for line in checks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    write_text(folder / "sweep.json", json.dumps({"arms": arms, "checks": checks}, indent=2) + "\n")
    write_text(folder / "report.md", markdown(folder.name, arms, checks))
    console.print(f"sweep: {relative(folder)}  (sweep.json, report.md)", markup=False, highlight=False, soft_wrap=True)


def read_arms(folder: Path) -> list[dict[str, Any]]:
    """The results of every arm, in the order in which they were written; ``name`` is the arm's folder."""
    files = sorted(folder.rglob(RESULTS), key=lambda file: file.stat().st_mtime)
    named = ((str(file.parent.relative_to(folder)), file.read_text(encoding="utf-8")) for file in files)
    return [{"name": name, **json.loads(text)} for name, text in named]


def kinds(arms: list[dict[str, Any]]) -> list[str]:
    """Every kind of fact that an arm reports."""
    return sorted({kind for arm in arms for kind in arm.get("metrics", {})})


def cells(arm: dict[str, Any], columns: list[str]) -> list[str]:
    """One row: the arm, its accuracy by kind, its cost. A failed arm says so in its row."""
    if arm["status"] not in ("finished", "interrupted"):
        return [arm["name"], *("failed" for _ in columns), "", "", "", ""]
    metrics = arm["metrics"]
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


def fairness(arms: list[dict[str, Any]]) -> list[str]:
    """Whether arms differ in nothing but what they were meant to: data, order, initial weights; and who failed."""
    begun = [arm for arm in arms if "data" in arm]
    lines = [_agree("same samples in the same order", {a["name"]: a["data"]["order_digest"] for a in begun}, begun)]
    for part in sorted({part for arm in begun for part in arm["init_digest"]}):
        by_shape: dict[str, dict[str, str]] = {}
        for arm in begun:
            by_shape.setdefault(arm["architecture_digest"][part], {})[arm["name"]] = arm["init_digest"][part]
        lines += [_agree(f"same initial weights ({part})", group, begun) for group in by_shape.values()]
    lines.append(_agree("same number of steps", {a["name"]: str(a["steps"]) for a in begun}, begun))
    lines += [f"failed: {arm['name']}: {arm.get('reason', 'it ended without a word')}" for arm in arms if _failed(arm)]
    return [line for line in lines if line]


def markdown(title: str, arms: list[dict[str, Any]], checks: list[str]) -> str:
    """For a lab book."""
    columns = kinds(arms)
    head = [_HEAD[0], *columns, *_HEAD[1:]]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    rows += [f"| {' | '.join(cells(arm, columns))} |" for arm in arms]
    return "\n".join([f"# {title}", "", *rows, "", *(f"- {line}" for line in checks), ""])


def _failed(arm: dict[str, Any]) -> bool:
    return arm["status"] not in ("finished", "interrupted")


def _agree(claim: str, values: dict[str, str], begun: list[dict[str, Any]]) -> str:
    """A line on whether all ``values`` (by arm) are equal; none where there is nothing to compare."""
    if len(values) < 2:
        return ""
    who = "all arms" if len(values) == len(begun) else ", ".join(values)
    if len(set(values.values())) == 1:
        return f"{who}: {claim}"
    return f"{who}: NOT the {claim} ({', '.join(f'{name} {value}' for name, value in values.items())})"
