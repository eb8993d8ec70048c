"""Answers to a benchmark on disk, as they come: what is stopped goes on, and what is kept says what made it.

A folder holds ``identity.json`` (what the answers depend on), while it is answered ``answers.N.jsonl`` of process N,
and at the end ``records.jsonl`` and ``results.json`` in their place.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from deepstack_pl.evaluation.benchmark import Line
from deepstack_pl.files import hold_or_warn, let_go, write_text

IDENTITY, RECORDS, RESULTS = "identity.json", "records.jsonl", "results.json"
_PARTS = "answers.*.jsonl"


class Others(Enum):
    """What becomes of answers that lie in the folder already."""

    refused = "refused"  # of another model, or to other questions: an error; others are gone on with
    renamed = "renamed"  # the same, but such answers get another name
    all_renamed = "all_renamed"  # nothing is gone on with


class Kept:
    """The answers in ``folder``, of process ``number``."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self._whole = False  # whether this process's file ends with a whole line
        self._claim: int | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS).is_file()

    def close(self) -> None:
        """Let others write into the folder."""
        if self._claim is not None:
            let_go(self._claim)
            self._claim = None

    def begin(self, identity: Mapping[str, Any], others: Others = Others.refused) -> Path | None:
        """Claim the folder until `close`, and make it that of ``identity``, or see that it is. What had to make room is
        where the path that is returned says. The first of all processes alone calls it.

        Raises:
            ValueError: it holds answers that something else made, or another program writes there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._claim = hold_or_warn(self.folder, str(self.folder))
        except BlockingIOError as error:
            raise ValueError(
                f"{self.folder}: another evaluation writes there now. Wait for it, or say to=FOLDER."
            ) from error
        file, aside = self.folder / IDENTITY, None
        if file.is_file():
            differ = _differences(_values(file), identity)
            if others is Others.all_renamed or (differ and others is Others.renamed):
                aside = self._set_aside()
            elif differ:
                said = "; ".join(differ[:4]) + ("; ..." if len(differ) > 4 else "")
                raise ValueError(
                    f"{self.folder} holds answers that something else made: {said}. "
                    "Say fresh=true to answer anew (what is there is kept, renamed), or to=FOLDER."
                )
        elif self._held():  # nobody knows what made them
            aside = self._set_aside()
        if not file.is_file():
            write_text(file, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        return aside

    def lines(self) -> dict[int, Line]:
        """Answers of all processes so far, by place."""
        if self.finished:
            return {line.index: line for line in read_lines(self.folder / RECORDS)}
        found: dict[int, Line] = {}
        for file in sorted(self.folder.glob(_PARTS)):
            for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError, KeyError, TypeError):  # a line that a kill or a power cut left: asked again
                    line = Line.from_dict(json.loads(text))
                    found[line.index] = line
        return found

    def keep(self, lines: Sequence[Line]) -> None:
        """Add lines to this process's file."""
        file = self.folder / f"answers.{self.number}.jsonl"
        if not self._whole and file.is_file():
            data = file.read_bytes()
            os.truncate(file, data.rfind(b"\n") + 1)  # what a kill left of a line
        self._whole = True
        with file.open("a", encoding="utf-8") as opened:
            opened.write(_text(lines))

    def finish(self, lines: Sequence[Line], results: Mapping[str, Any]) -> None:
        """Put ``records.jsonl`` and ``results.json`` in the place of the parts; the first process alone calls it."""
        write_text(self.folder / RECORDS, _text(lines))
        write_text(self.folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        for part in self.folder.glob(_PARTS):
            part.unlink()

    def _held(self) -> list[str]:
        """The names of what is kept here, identity aside."""
        there = [RESULTS, RECORDS, *sorted(part.name for part in self.folder.glob(_PARTS))]
        return [name for name in there if (self.folder / name).exists()]

    def _set_aside(self) -> Path:
        number = 1
        while (aside := self.folder / f"before_{number}").exists():
            number += 1
        aside.mkdir()
        for name in [*self._held(), IDENTITY]:  # last: without it nothing is gone on with
            if (self.folder / name).exists():
                (self.folder / name).rename(aside / name)
        return aside


def read_results(folder: Path) -> dict[str, Any]:
    """What an evaluation found.

    Raises:
        ValueError: there is none, or it did not come to its end.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise ValueError(f"{folder}: no evaluation that came to its end ({RESULTS} is missing). Run evaluate.py again.")
    return _values(file)


def read_lines(file: Path) -> list[Line]:
    """The answers in a ``records.jsonl``.

    Raises:
        ValueError: it is damaged.
    """
    found: list[Line] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if text:
            try:
                found.append(Line.from_dict(json.loads(text)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: damaged. Evaluate again with fresh=true.") from error
    return found


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}). Move its folder away, and evaluate again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: damaged. Move its folder away, and evaluate again.")
    return values


def _differences(kept: Any, wanted: Mapping[str, Any]) -> list[str]:
    before, now = _flat(kept), _flat(json.loads(json.dumps(wanted)))
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {
            k: v for key, value in values.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()
        }
    return {name: values}


def _text(lines: Sequence[Line]) -> str:
    """A line each. Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays escaped."""
    text = "".join(json.dumps(line.to_dict(), ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace").decode()
