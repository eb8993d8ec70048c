"""What a receipt says of every injection, for people and for files."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from deepstack_pl.stacking.plan import Injection, Plan


class ReceiptError(RuntimeError):
    """An injection of the plan does not happen as planned."""


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """One injection, tried.

    Attributes:
        expected: positions of the batch's images that it must touch.
        touched: positions at which the residual stream changed (0 where its gate is closed).
        gradient: norm of the loss's gradient in what was added; of the gate's own where that is closed.
        logit_change: largest change of a logit when its group is left out.
        reason: what is wrong, or worth knowing.
    """

    injection: Injection
    expected: int
    touched: int
    gradient: float
    logit_change: float
    ok: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        values = {"expected": self.expected, "touched": self.touched, "gradient": self.gradient}
        rest = {"logit_change": self.logit_change, "ok": self.ok, "reason": self.reason}
        return {"injection": str(self.injection), **values, **rest}


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of what is injected where; ``rows`` is empty where the plan is.

    Attributes:
        text: what is wrong with the images in the text; empty where nothing is.
    """

    plan: Plan
    rows: tuple[ReceiptRow, ...]
    text: str = ""

    @property
    def ok(self) -> bool:
        return not self.text and all(row.ok for row in self.rows)

    def require(self) -> None:
        """Stop a run whose receipt fails.

        Raises:
            ReceiptError: names every injection that failed, and how.
        """
        if not self.ok:
            failed = [f"  {self.text}"] if self.text else []
            failed += [f"  {row.injection}: {row.reason}" for row in self.rows if not row.ok]
            raise ReceiptError("\n".join([f"plan {self.plan.name} does not happen as planned:", *failed]))

    def notes(self) -> list[str]:
        """What the table does not say: an empty plan, dropped injections, idle groups."""
        notes = [f"FAILED: {self.text}"] if self.text else []
        notes += [] if self.rows else ["no injections: nothing is stacked"]
        notes += [f"dropped beyond the depth: {injection}" for injection in self.plan.dropped]
        return notes + self.plan.notes()

    def to_dict(self) -> dict[str, Any]:
        head = {"plan": self.plan.name, "digest": self.plan.digest, "ok": self.ok}
        return {**head, "injections": [row.to_dict() for row in self.rows], "notes": self.notes()}

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            title=f"receipt of plan {self.plan.name} ({self.plan.digest})", caption="\n".join(self.notes()) or None
        )
        columns = _COLUMNS if any(row.reason for row in self.rows) else _COLUMNS[:-1]
        for name in columns:
            table.add_column(name, justify="left" if name in ("injection", "note") else "right")
        for row in self.rows:
            table.add_row(*_cells(row)[: len(columns)], style=None if row.ok else "bold red")
        return table

    def markdown(self) -> str:
        """For TensorBoard and reports."""
        lines = [f"Receipt of plan {self.plan.name} ({self.plan.digest}): {'ok' if self.ok else 'FAILED'}", ""]
        if self.rows:
            lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
            lines += [f"| {' | '.join(_cells(row))} |" for row in self.rows] + [""]
        return "\n".join(lines + [f"- {note}" for note in self.notes()]).rstrip()


_COLUMNS = ("injection", "expected", "touched", "gradient", "logit change", "ok", "note")


def _cells(row: ReceiptRow) -> list[str]:
    numbers = [f"{row.expected}", f"{row.touched}", f"{row.gradient:.3g}", f"{row.logit_change:.3g}"]
    return [str(row.injection), *numbers, "yes" if row.ok else "NO", row.reason]
