"""What a sweep found: one table over its arms, and whether the comparison was fair. Loads without torch."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deepstack_pl.cli.folders import RESULTS, discard_if_empty, relative, write_text
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
    if not arms:  # a dry run leaves nothing, Hydra's own file included
        (folder / "multirun.yaml").unlink(missing_ok=True)
        discard_if_empty(folder)
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
    """One row: the arm, its accuracy by kind, its cost. An arm without a report says so in its row."""
    metrics = arm.get("metrics")
    if not metrics or _state(arm) not in ("finished", "interrupted"):
        return [arm["name"], *(_state(arm) for _ in columns), "", "", "", ""]
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
    """Whether arms differ in nothing but what they were meant to: data, order, initial weights; and who did not finish.

    Arms that did not finish trained on fewer samples, so that they are not compared.
    """
    done = [arm for arm in arms if _state(arm) == "finished"]
    all_of_them = "all arms" if len(done) == len(arms) else "all arms that finished"
    claims: list[tuple[str, dict[str, str]]] = [
        ("same samples in the same order", {a["name"]: a["data"]["order_digest"] for a in done}),
        ("same validation samples", {a["name"]: a["data"]["fingerprint"]["val"] for a in done}),
    ]
    for part in sorted({part for arm in done for part in arm["init_digest"]}):
        by_shape: dict[str, dict[str, str]] = {}
        for arm in done:
            by_shape.setdefault(arm["architecture_digest"][part], {})[arm["name"]] = arm["init_digest"][part]
        claims += [(f"same initial weights ({part})", group) for group in by_shape.values()]
    claims.append(("same number of steps", {a["name"]: str(a["steps"]) for a in done}))
    lines = [
        _agree(claim, values, all_of_them if len(values) == len(done) else ", ".join(values))
        for claim, values in claims
        if len(values) > 1
    ]
    return lines + [f"{_state(arm)}: {arm['name']}: {_reason(arm)}" for arm in arms if _state(arm) != "finished"]


def markdown(title: str, arms: list[dict[str, Any]], checks: list[str]) -> str:
    """For a lab book."""
    columns = kinds(arms)
    head = [_HEAD[0], *columns, *_HEAD[1:]]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    rows += [f"| {' | '.join(cells(arm, columns))} |" for arm in arms]
    return "\n".join([f"# {title}", "", *rows, "", *(f"- {line}" for line in checks), ""])


def _state(arm: dict[str, Any]) -> str:
    """How the arm ended; one that says it is running still was ended from outside."""
    return "failed" if arm["status"] == "running" else arm["status"]


def _reason(arm: dict[str, Any]) -> str:
    if "reason" in arm:
        return arm["reason"]
    return f"at step {arm['steps']}" if arm["status"] == "interrupted" else "it ended without a word"


def _agree(claim: str, values: dict[str, str], who: str) -> str:
    """A line on whether all ``values`` (by arm) are equal."""
    if len(set(values.values())) == 1:
        return f"{who}: {claim}"
    return f"{who}: NOT the {claim} ({', '.join(f'{name} {value}' for name, value in values.items())})"
