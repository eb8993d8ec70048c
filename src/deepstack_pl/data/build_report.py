"""What `build` did, for the terminal: totals against what the corpus is published with, and what was left out."""

from collections import defaultdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepstack_pl.data.build import Report
from deepstack_pl.data.config import ExpectedConfig
from deepstack_pl.data.corpora import LeftOut
from deepstack_pl.data.llava import TEXT

EXAMPLES = 3


def show(report: Report, name: str, expected: ExpectedConfig, console: Console) -> None:
    """Print it."""
    console.print(_totals(report, name, expected))
    seen = report.survey
    for count, what in (
        (seen.repeated, "ask several times for their one image, which is shown once, first in its turn"),
        (seen.leading, "start with an answer, which is dropped"),
        (seen.trailing, "end with a question, which is dropped"),
    ):
        if count:
            console.print(f"Put right as published: {count:,} that {what}", soft_wrap=True)
    _show_left_out(report.left_out, console)
    if report.whole:
        for split, shards in report.shards.items():
            samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
            console.print(f"{split}: {samples:,} samples in {len(shards)} shards, {size / 1e6:,.1f} MB")
        if report.kept:
            console.print(f"{report.kept} shards were finished before and are kept")
    if report.left_out:
        console.print(f"Every record that cannot be taken: {escape(str(report.listed))}", soft_wrap=True)


def _totals(report: Report, name: str, expected: ExpectedConfig) -> Table:
    """Published, found in the file, and taken: in all, without an image, and by source."""
    seen = report.survey
    table = Table(title=f"{escape(name)}: records", title_justify="left")
    for column in ("", "published", "in the file", "taken"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("")
    rows = [("all", expected.records, seen.records, report.taken.total())]
    rows.append(("without an image", expected.text_only, seen.text_only, report.text_only))
    counted = {TEXT} if seen.sources[TEXT] == seen.text_only else set()
    for source in sorted({*seen.sources, *expected.sources} - counted):
        rows.append((source, expected.sources.get(source), seen.sources[source], report.taken[source]))
    for what, published, found, taken in rows:
        same = "" if published is None else "as published" if published == found else f"{found - published:+,}"
        said = "-" if published is None else f"{published:,}"
        table.add_row(escape(what), said, f"{found:,}", f"{taken:,}" if report.whole else "-", same)
    return table


def _show_left_out(lines: list[LeftOut], console: Console) -> None:
    by_reason: dict[str, list[LeftOut]] = defaultdict(list)
    for line in lines:
        by_reason[line.reason].append(line)
    for reason, of_it in sorted(by_reason.items()):
        console.print(f"{len(of_it):,} cannot be taken, reason: {reason}", style="bold")
        for line in of_it[:EXAMPLES]:
            console.print(f"  {_plain(line.sentence)}", markup=False, highlight=False, soft_wrap=True)
        if len(of_it) > EXAMPLES:
            console.print(f"  ... and {len(of_it) - EXAMPLES:,} more")


def _plain(text: str) -> str:
    """What a record says must not steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
