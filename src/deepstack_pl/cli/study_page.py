"""``deepstack report``: a sweep, or runs, as one HTML page that needs no other file, and as a Markdown table."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepstack_pl.cli.folders import relative
from deepstack_pl.cli.report import duration, share
from deepstack_pl.files import write_text

if TYPE_CHECKING:
    from deepstack_pl.cli.study import Arm, Study

HELP = "a sweep or runs as a page: paired differences, curves, costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Reads results.json and predictions.jsonl of finished runs and writes report.html and report.md: accuracy with "
        "intervals, paired differences from one arm, learning curves, quality against cost, who did not finish."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a sweep's folder, or some runs'")
    parser.add_argument("--against", metavar="ARM", help="compare with this one; default: the baseline, else the first")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write there; default: into the first folder")


def run(args: argparse.Namespace) -> int:
    """Write the page; the exit status.

    Raises:
        ValueError: nothing to report.
    """
    from rich.console import Console

    from deepstack_pl.cli.study import read_study

    study = read_study(args.folders, args.against)
    folder = args.to or args.folders[0]
    write_page(study, folder)
    console = Console(soft_wrap=True)
    for line in comparisons(study):
        console.print(line, markup=False, highlight=False)
    console.print(f"report: {relative(folder / 'report.html')}, report.md", markup=False, highlight=False)
    return 0


def write_page(study: "Study", folder: Path) -> None:
    """``report.html`` and ``report.md`` in ``folder``."""
    from jinja2 import Environment, PackageLoader

    from deepstack_pl.cli.arms import fairness
    from deepstack_pl.cli.study_charts import figures, svg

    tables = [table_of(study, kind) for kind in study.kinds] + [costs_of(study)]
    checks = fairness([run for arm in study.arms for run in arm.runs.values()], complete=not study.left)
    facts = {
        "study": study,
        "summary": summary(study),
        "tables": tables,
        "checks": checks,
        "commands": commands(study),
        "versions": versions(study),
    }
    drawn = {title: svg(figure) for title, figure in figures(study).items()}
    pages = Environment(loader=PackageLoader("deepstack_pl.cli", "pages"), autoescape=True)
    write_text(folder / "report.html", pages.get_template("study.html").render(**facts, figures=drawn))
    write_text(folder / "report.md", markdown(study, tables, checks))


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def table_of(study: "Study", kind: str) -> Table:
    """Accuracy on one kind of facts, and how arms differ from the one they are compared with."""
    head = ["arm", f"{kind} facts", "while training", "seeds"]
    several, found, ps = len(study.arms) > 1, study.differences(kind), study.adjusted(kind)
    if several:
        head[2:2] = [f"against {study.against.name}", "p"]
    rows = []
    for arm in study.arms:
        on_the_way = arm.on_the_way(kind)
        row = [arm.name, share(arm.accuracy(kind), list(arm.interval(kind)))]
        if several:
            row += [_difference(found.get(arm.name)), _p(ps.get(arm.name))]
        rows.append([*row, "" if on_the_way is None else f"{on_the_way:.3f}", f"{len(arm.runs)}"])
    return Table(f"{kind.capitalize()} facts", head, rows, _note(study) if several else "")


def costs_of(study: "Study") -> Table:
    """What each arm costs."""
    head = ["arm", "context tokens", "seen tokens", "parameters", "FLOPs", "peak memory", "tokens/s", "training"]
    return Table("Costs", head, [_costs(arm) for arm in study.arms], "Means over seeds.")


def comparisons(study: "Study") -> list[str]:
    """A sentence for each kind and arm."""
    lines = [summary(study)]
    for kind in study.kinds:
        found, ps = study.differences(kind), study.adjusted(kind)
        for arm in study.arms:
            difference = found.get(arm.name)
            text = share(arm.accuracy(kind), list(arm.interval(kind)))
            if difference is not None:
                text += f", {_difference(difference)} against {study.against.name}"
            lines.append(f"  {kind}, {arm.name}: {text}{f', p {_p(ps[arm.name])}' if arm.name in ps else ''}")
    return lines


def summary(study: "Study") -> str:
    """What is compared, in one sentence."""
    runs = sum(len(arm.runs) for arm in study.arms)
    left = f"; {len(study.left)} not finished" if study.left else ""
    if len(study.arms) == 1:
        return f"{runs} finished run{'s' * (runs > 1)} of one arm{left}."
    return f"{runs} finished runs in {len(study.arms)} arms, compared with {study.against.name}{left}."


def commands(study: "Study") -> list[str]:
    """What was typed, each once."""
    return list(dict.fromkeys(run["starts"][0]["command"] for arm in study.arms for run in arm.runs.values()))


def versions(study: "Study") -> dict[str, str]:
    """Of everything that made the numbers; where runs differ, all of them."""
    found: dict[str, list[str]] = {}
    for arm in study.arms:
        for run in arm.runs.values():
            git = run.get("git", {})
            commit = f"{git['commit'][:12]}{', changed since' if git.get('dirty') else ''}" if git.get("commit") else ""
            for name, value in {"commit": commit, "device": run["device"], **run["versions"]}.items():
                if value and str(value) not in found.setdefault(name, []):
                    found[name].append(str(value))
    return {name: "; ".join(values) for name, values in found.items()}


def markdown(study: "Study", tables: list[Table], checks: list[str]) -> str:
    """For a lab book."""
    lines = [f"# {study.name}", "", summary(study), ""]
    for table in tables:
        lines += [f"| {' | '.join(table.head)} |", f"|---|{'---:|' * (len(table.head) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in table.rows] + ["", *([table.note, ""] if table.note else [])]
    lines += [f"- {line}" for line in [*checks, *study.left]]
    return "\n".join([*lines, "", *(f"    {command}" for command in commands(study)), ""])


def _difference(found: Any) -> str:
    if found is None or isinstance(found, str):
        return found or ""
    if not found.flipped:
        return "no sample differs"
    return f"{found.delta:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _note(study: "Study") -> str:
    seeds = min(len(arm.runs) for arm in study.arms)
    text = "Intervals of 95%. Differences: paired bootstrap over samples"
    text += " and seeds" if seeds > 1 else "; one seed, so that another seed's luck is not in them"
    if len(study.arms) > 2:
        text += f"; p corrected for {len(study.arms) - 1} comparisons (Holm)"
    return f"{text}. While training: accuracy averaged over its validations."


def _costs(arm: "Arm") -> list[str]:
    tokens, parameters = arm.one["tokens_per_image"], arm.one["parameters"]
    flops, memory, speed = (arm.cost(name) for name in ("flops", "memory", "speed"))
    seconds = [run["seconds"]["train"] for run in arm.runs.values()]
    return [
        arm.name,
        f"{tokens['context']}",
        f"{tokens['seen']}",
        f"{parameters['total']:,}",
        _or_nothing(flops, "{:.3g}"),
        _or_nothing(memory, "{:.2f} GB"),
        _or_nothing(speed, "{:,.0f}"),
        duration(sum(seconds) / len(seconds)),
    ]


def _or_nothing(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
