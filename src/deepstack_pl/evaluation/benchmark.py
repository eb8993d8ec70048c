"""A benchmark over local copies of its published files: what is asked, and what becomes of an answer."""

import hashlib
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.evaluation.config import HELD_OUT, WITHOUT, TaskConfig
from deepstack_pl.evaluation.runner import SampleResult
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.all import find
from deepstack_pl.vision.images import decode_image

_NAMED = 3  # of what is missing
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """One answer, scored: a line of ``records.jsonl``.

    Attributes:
        index: its place among the questions.
        image: its picture's file, below the task's folder of pictures.
        not_asked: why it was not asked, and so has an empty answer; None where it was.
    """

    index: int
    key: str
    kind: str
    image: str
    prompt: str
    prediction: str
    answers: tuple[str, ...]
    score: float
    not_asked: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "answers": tuple(values["answers"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "answers": list(self.answers)}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark, ready to be asked.

    Attributes:
        fingerprint: SHA-256 of its files of questions and answers; pictures are named by them, not read.
        pictures: SHA-256 of the names and sizes of its pictures.
        left_out: a sentence about questions of its files that nobody asks; "" where there is none.
    """

    name: str
    config: TaskConfig
    task: Task
    questions: tuple[Question, ...]
    fingerprint: str
    left_out: str
    pictures: str

    @classmethod
    def open(cls, name: str, config: TaskConfig) -> Self:
        """Read its questions, and see that every picture is there.

        Raises:
            ValueError: there is no such task, a file is missing or not what it should be, or pictures are missing.
        """
        if not _NAME.fullmatch(name) or name == HELD_OUT or name.endswith(WITHOUT):
            raise ValueError(
                f"evaluation.tasks.{name}: results lie in a folder of that name. Take letters, digits, '_', '-' and "
                f"'.', at most 80, the first a letter or digit; {HELD_OUT!r} and endings in {WITHOUT!r} are taken."
            )
        task = find(config.task)
        if config.samples is not None and config.samples < 1:
            raise ValueError(f"evaluation.tasks.{name}.samples={config.samples}: use 1 or more, or null for all.")
        if config.max_new_tokens < 1:
            raise ValueError(f"evaluation.tasks.{name}.max_new_tokens={config.max_new_tokens}: use 1 or more.")
        questions = task.read(config)[: config.samples]
        if not questions:
            raise ValueError(f"{name}: {', '.join(config.questions)} in {config.root} hold no question to ask.")
        digest = hashlib.sha256()
        for file in (*config.questions, *config.annotations):
            with (Path(config.root) / file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        pictures = _pictures(name, config, questions)
        return cls(name, config, task, tuple(questions), digest.hexdigest(), task.left_out(config), pictures)

    def __len__(self) -> int:
        return len(self.questions)

    def picture(self, index: int) -> Path:
        """Where the picture of a question lies."""
        return Path(self.config.root) / self.config.images / self.questions[index].image

    def record(self, index: int) -> Record:
        """What the model is shown and asked.

        Raises:
            Refused: its picture cannot be read.
        """
        question, file = self.questions[index], self.picture(index)
        return Record(
            key=question.key,
            turns=(Turn(Role.user, f"<image>\n{question.prompt}"),),
            images=(decode_image(file.read_bytes(), str(file)),),
            kind=question.kind,
        )

    def judge(self, answers: Sequence[tuple[int, str, str | None]]) -> list[Line]:
        """Score answers: (place, prediction, why it was not asked)."""
        metric = self.task.metric()
        return [self._line(index, metric.score(self.questions[index], said), said, why) for index, said, why in answers]

    def metrics(self, lines: Sequence[Line], confidence: float) -> dict[str, dict[str, Any]]:
        """By kind, and of all: what the benchmark's official scorer says of these answers."""
        # Every process has all lines: added up, each would count as often as there are processes.
        metric = self.task.metric(confidence, sync_on_compute=False)
        for line in lines:
            metric.update(self.questions[line.index], line.prediction)
        return metric.compute()

    def page(self, line: Line) -> tuple[Record, SampleResult]:
        """One answer for a picture: what was asked, with the first answer that is right, and what came."""
        record, answer = self.record(line.index), line.answers[0]
        right = line.score == 1
        found = SampleResult(
            line.index, line.key, self.name, line.prompt, line.prediction, answer, (answer,), (right,), right
        )
        return replace(record, turns=(*record.turns, Turn(Role.assistant, answer))), found

    def describe(self) -> str:
        pictures = len({question.image for question in self.questions})
        said = f"{self.name}: {len(self):,} questions on {pictures:,} pictures, fingerprint {self.fingerprint[:12]}"
        return f"{said}. {self.left_out}" if self.left_out else said

    def _line(self, index: int, score: float, said: str, why: str | None) -> Line:
        its = self.questions[index]
        return Line(index, its.key, its.kind, its.image, its.prompt, said, its.answers, score, why)


def _pictures(name: str, config: TaskConfig, questions: Sequence[Question]) -> str:
    """A digest of what pictures are there.

    Raises:
        ValueError: some are not.
    """
    folder, digest, missing = Path(config.root) / config.images, hashlib.sha256(), list[str]()
    names = list(dict.fromkeys(question.image for question in questions))
    for image in names:
        try:
            digest.update(f"{image}\0{_size(folder / image)}\0".encode("utf-8", "backslashreplace"))
        except OSError:
            missing.append(image)
    if missing:
        few = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ValueError(
            f"{name}: {len(missing):,} of {len(names):,} pictures are not in {folder}: {few}. Fetch them "
            f"(docs/benchmarks.md says from where), or say evaluation.tasks.{name}.images=FOLDER."
        )
    return digest.hexdigest()


def _size(file: Path) -> int:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(file)
    return found.st_size
