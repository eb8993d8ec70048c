"""Published question files, read strictly: what is wrong with one is a sentence with file, record, rule and remedy."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from deepstack_pl.evaluation.answer_metric import ALL
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question
from deepstack_pl.language.template import IMAGE

_AGAIN = "download the published file again, or leave the record out"


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a file.

    Attributes:
        place: which one, for messages: ``record 3`` of a list (from 0), ``line 4``, or a key.
    """

    file: Path
    place: str
    values: dict[str, Any]

    def text(self, field: str) -> str:
        """A string."""
        value = self._value(field, "a string")
        if not isinstance(value, str):
            raise self.bad(f"{field} is {_short(value)}, which is no string")
        return self._whole(field, value)

    def word(self, field: str) -> str:
        """A string or a whole number, as a string: identifiers are published as either."""
        value = self._value(field, "a string or a whole number")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise self.bad(f"{field} is {_short(value)}, which is neither a string nor a whole number")
        return self._whole(field, value)

    def texts(self, field: str, count: int | None = None) -> tuple[str, ...]:
        """A list of strings, ``count`` of them, or at least one."""
        value = self._value(field, "a list of strings")
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.bad(f"{field} is {_short(value)}, which is no list of strings")
        if len(value) != count if count is not None else not value:
            raise self.bad(f"{field} holds {len(value)} strings, but the score needs {count or 'at least one'}")
        return tuple(self._whole(field, text) for text in value)

    def entries(self, field: str) -> list["Entry"]:
        """A list of objects."""
        value = self._value(field, "a list of objects")
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.bad(f"{field} is {_short(value)}, which is no list of objects")
        return [Entry(self.file, f"{self.place}, {field} {place}", each) for place, each in enumerate(value)]

    def picture(self, field: str, name: str = "{}") -> str:
        """The picture's file that ``field`` names, or ``name`` with the field in it: below the folder of pictures."""
        file = name.format(self.word(field))
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or not path.parts or not file.isprintable():
            raise self.bad(
                f"{field} gives the picture {file!r}, which is no file below the task's images folder",
                "name pictures by relative paths without '..', in printable characters",
            )
        return str(path)

    def bad(self, rule: str, remedy: str = _AGAIN) -> ValueError:
        """The error that says what is wrong with this record."""
        return ValueError(f"{self.file}, {self.place}: {rule}; {remedy}.")

    def _value(self, field: str, what: str) -> Any:
        if field not in self.values:
            raise self.bad(f"it has no {field}, which should be {what}")
        return self.values[field]

    def _whole(self, field: str, text: str) -> str:
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.bad(f"{field} holds half a character (a lone surrogate), which no tokenizer reads")
        return text


def records(config: TaskConfig, field: str = "") -> Iterator[Entry]:
    """The records of all the task's question files, each of which is a list, or an object whose ``field`` is one."""
    for file in _files(config, "questions"):
        yield from _records(file, field)


def annotations(config: TaskConfig, field: str) -> Iterator[Entry]:
    """The records of all the task's annotation files, likewise."""
    for file in _files(config, "annotations"):
        yield from _records(file, field)


def keyed(config: TaskConfig) -> Iterator[tuple[str, Entry]]:
    """Key and record of all the task's question files, each of which is an object of objects."""
    for file in _files(config, "questions"):
        found = _load(file, {"object_pairs_hook": lambda pairs, file=file: _distinct(pairs, file)})
        if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
            raise _structure(file, "an object of objects, one for each question")
        for key, values in found.items():
            yield key, Entry(file, f"record {key}", values)


def lines(config: TaskConfig) -> Iterator[Entry]:
    """The records of all the task's question files, each of which is JSON lines; empty lines are passed over."""
    for file in _files(config, "questions"):
        for number, line in enumerate(_text(file).split("\n"), 1):
            if not line.strip():
                continue
            values = _parse(line, f"{file}, line {number}")
            if not isinstance(values, dict):
                raise _structure(file, f"one JSON object a line, which line {number} is not")
            yield Entry(file, f"line {number}", values)


def mapping(file: Path, field: str) -> dict[str, Any]:
    """The object that ``field`` of a file's object is."""
    found = _load(file)
    if not isinstance(found, dict) or not isinstance(found.get(field), dict):
        raise _structure(file, f'{{"{field}": {{...}}, ...}}')
    return found[field]


def gather(config: TaskConfig, questions: Iterable[tuple[Entry, Question]]) -> list[Question]:
    """All of them, in order; refused where two share a key, or there are none."""
    found: dict[str, Question] = {}
    for entry, question in questions:
        if question.kind == ALL or not question.kind.isprintable():
            raise entry.bad(f"its kind is {question.kind!r}; {ALL!r} is that of all questions, and kinds are printed")
        if IMAGE in question.prompt:
            raise entry.bad(f"{IMAGE} stands in its question, where the model would look for a second picture")
        if question.key in found:
            raise entry.bad(f"a second question is called {question.key!r}, but answers are kept by that name")
        found[question.key] = question
    if not found:
        raise ValueError(
            f"{_files(config, 'questions')[0]}: it holds no question that task {config.task} can ask; {_AGAIN}."
        )
    return list(found.values())


def ask(config: TaskConfig, question: str) -> str:
    """The task's prompt with ``question`` in it."""
    if "{question}" not in config.prompt:
        raise ValueError(
            f"prompt={config.prompt!r} of task {config.task} does not hold {{question}}, so that every question would "
            "read the same; write {question} where the question goes."
        )
    return config.prompt.replace("{question}", question)  # not format(): a prompt may hold other braces


def only_questions(config: TaskConfig) -> None:
    """Refuse values that a task without annotations and OCR would pass over."""
    if config.annotations or config.ocr:
        raise ValueError(
            f"task {config.task} reads neither annotations nor OCR, but has annotations={config.annotations} and "
            f"ocr={config.ocr}; leave both out."
        )


def _files(config: TaskConfig, what: str) -> list[Path]:
    names = config.questions if what == "questions" else config.annotations
    if not names:
        raise ValueError(
            f"task {config.task} has no {what}: give it a list of files below root={config.root}, as in "
            f"conf/evaluation/{config.task}.yaml."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{what}={names} of task {config.task} names a file twice; name each once.")
    return [Path(config.root) / name for name in names]


def _records(file: Path, field: str) -> Iterator[Entry]:
    found = _load(file)
    if field:
        found = found.get(field) if isinstance(found, dict) else None
    if not isinstance(found, list) or not all(isinstance(values, dict) for values in found):
        raise _structure(file, f'{{"{field}": [{{...}}, ...]}}' if field else "[{...}, ...]")
    for number, values in enumerate(found):
        yield Entry(file, f"record {number}", values)


def _load(file: Path, how: dict[str, Any] | None = None) -> Any:
    return _parse(_text(file), str(file), how)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8; download the published file again.") from error
    except OSError as error:
        raise ValueError(
            f"{file}: it cannot be read ({error.strerror}); put the published file there, or set the task's root to "
            "where it lies (docs/benchmarks.md has the layout)."
        ) from error


def _parse(text: str, where: str, how: dict[str, Any] | None = None) -> Any:
    try:
        return json.loads(text, **(how or {}))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: it is no JSON, or cut off ({error.msg} at line {error.lineno}, column {error.colno}); "
            "download the published file again."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: it is nested too deep; download the published file again.") from error


def _distinct(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{file}, record {key}: the key {key!r} is there twice; {_AGAIN}.")
        found[key] = value
    return found


def _structure(file: Path, should: str) -> ValueError:
    return ValueError(f"{file}: its structure is not {should}; download the published file again.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
