"""``deepstack parity FOLDER``: published inputs through this model, published outputs beside its own.

Nothing heavy is imported before the command really runs, so that ``--help`` is instant.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from deepstack_pl.inspection.measured import Measured
    from deepstack_pl.inspection.parity import CaseResult

HELP = "compare this model with stored inputs and outputs of the published code"
_WIDEST = 120  # no table is wider: the longest names of cases fold before that
_SHOWN = 6  # lines about one case: what goes wrong in one layer goes wrong in every later one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Runs every case of a folder in the layout of tests/golden/README.md in float32 on the CPU: preprocessing from "
        "the images, every stored layer input, logits, loss, gradients and greedy ids. Exits with 1 where one is not "
        "the published code's within its bound."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds cases/, checkpoints/ and the vision tower")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case alone; may be said several times")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="default: sdpa")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison there, too")


def run(args: argparse.Namespace) -> int:
    """Run the cases and report; the exit status.

    Raises:
        ValueError: there are no such cases, or the file cannot be written.
    """
    from rich.console import Console

    from deepstack_pl.files import write_text
    from deepstack_pl.inspection.parity import cases_of, run_case

    # A table never loses a digit to a narrow window or a pipe.
    console = Console(width=_WIDEST, highlight=False, soft_wrap=False)
    names = _chosen(cases_of(args.folder), args.case, args.folder)
    results = []
    with _progress(console, names) as steps:
        for name in steps:
            results.append(run_case(args.folder, name, attention=args.attention))
    _report(console, results)
    if args.json is not None:
        ok = all(result.ok for result in results)
        values = {"ok": ok, "attention": args.attention, "cases": [result.to_dict() for result in results]}
        try:
            write_text(args.json, json.dumps(values, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise ValueError(f"--json {args.json}: {error.strerror}. Name a file in a folder that is there.") from error
    return int(not all(result.ok for result in results))


def _chosen(names: list[str], wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """The cases asked for, each once.

    Raises:
        ValueError: one of them is not there.
    """
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ValueError(f"--case {unknown[0]}: {folder} has no such case. There are {', '.join(names)}.")
    return list(dict.fromkeys(wanted or names))


@contextmanager
def _progress(console: "Console", names: list[str]) -> Iterator[Iterator[str]]:
    """The names one by one, with a bar where somebody watches."""
    if not console.is_terminal:
        yield iter(names)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=len(names))

        def steps() -> Iterator[str]:
            for name in names:
                bar.update(task, description=name)
                yield name
                bar.advance(task)

        yield steps()


def _report(console: "Console", results: "list[CaseResult]") -> None:
    """The table, what is wrong in it, the bounds and the sum."""
    from deepstack_pl.inspection.parity import BOUNDS

    console.print(_table(results))
    for result in results:
        for line in _wrong(result):
            console.print(f"{result.name}: {line}", style="red", markup=False, soft_wrap=True)
        for note in result.notes:
            console.print(f"{result.name}: {note}", markup=False, soft_wrap=True)
    for line in (_by_part(results), BOUNDS, _sum(results)):
        if line:
            console.print(line, markup=False, soft_wrap=True)


def _table(results: "list[CaseResult]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from deepstack_pl.inspection.measured import Quantity

    quantities = [quantity for quantity in Quantity if quantity is not Quantity.unknown]
    # As narrow as it can be: the golden cases fit a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("case", overflow="fold")
    for quantity in quantities:
        name = "inputs" if quantity is Quantity.layer_inputs else quantity.value
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        if result.error:
            table.add_row(Text(result.name, style="red"), Text("error", style="red"))
            continue
        cells = [_cell(result, quantity) for quantity in quantities]
        table.add_row(Text(result.name, style="" if result.ok else "red"), *(Text(*cell) for cell in cells))
    return table


def _cell(result: "CaseResult", quantity: Any) -> tuple[str, str]:
    """The largest difference of a quantity, and its colour."""
    from deepstack_pl.inspection.measured import Quantity

    rows = [row for row in result.rows if row.quantity is quantity]
    if not rows:
        return "-", ""
    style = "" if all(row.ok for row in rows) else "bold red"
    if quantity in (Quantity.grids, Quantity.greedy):
        wrong, count = sum(row.largest for row in rows), sum(row.count for row in rows)
        return (f"{wrong:.0f} of {count}" if wrong else "exact"), style
    if any(row.share > 1 and not isfinite(row.largest) for row in rows):
        return "NaN" if any(row.count for row in rows if not row.ok) else "differs", style
    return _number(max(row.largest for row in rows)), style


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _wrong(result: "CaseResult") -> list[str]:
    """What is wrong with a case, a line each."""
    if result.error:
        return [f"error: {result.error}"]
    failed = [row for row in result.rows if not row.ok]
    lines = [f"{row.name}: {_excess(row)}" for row in failed[:_SHOWN]]
    if len(failed) > _SHOWN:
        lines.append(f"and {len(failed) - _SHOWN} more (--json FILE lists all)")
    return lines


def _excess(row: "Measured") -> str:
    if not row.bound or not row.count:
        return row.reason
    return f"{_number(row.largest)} at the most; {row.reason}, where {row.bound:.1e} is allowed"


def _by_part(results: "list[CaseResult]") -> str:
    """The gradients' largest differences, part by part."""
    from deepstack_pl.inspection.measured import Quantity

    worst: dict[str, Measured] = {}
    for row in (row for result in results for row in result.rows if row.quantity is Quantity.gradients):
        if row.part not in worst or row.share > worst[row.part].share:
            worst[row.part] = row
    told = [f"{part} {_number(row.largest)} ({row.share:.2g})" for part, row in worst.items()]
    return f"gradients by part (as a share of what is allowed there): {', '.join(told)}" if told else ""


def _sum(results: "list[CaseResult]") -> str:
    """``24 cases: 24 equal the published code``."""
    equal = sum(result.ok for result in results)
    errors = sum(bool(result.error) for result in results)
    parts = [f"{equal} equal the published code"]
    if len(results) - equal - errors:
        parts.append(f"{len(results) - equal - errors} differ")
    if errors:
        parts.append(f"{errors} could not be run")
    return f"{len(results)} case{'s' if len(results) > 1 else ''}: {', '.join(parts)}"
