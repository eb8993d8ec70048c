"""A benchmark over local copies of its published files: what is asked, and what becomes of an answer."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.runner import SampleResult
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.all import find
from deepstack_pl.vision.images import decode_image

_NAMED = 3  # of what is missing


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
        left_out: a sentence about questions of its files that nobody asks; "" where there is none.
    """

    name: str
    config: TaskConfig
    task: Task
    questions: tuple[Question, ...]
    fingerprint: str
    left_out: str

    @classmethod
    def open(cls, name: str, config: TaskConfig) -> Self:
        """Read its questions, and see that every picture is there.

        Raises:
            ValueError: there is no such task, a file is missing or not what it should be, or pictures are missing.
        """
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
        found = cls(name, config, task, tuple(questions), digest.hexdigest(), task.left_out(config))
        found._require_pictures()
        return found

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

    def _require_pictures(self) -> None:
        names = {question.image: index for index, question in reversed(list(enumerate(self.questions)))}
        missing = [name for name, index in names.items() if not self.picture(index).is_file()]
        if missing:
            few = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise ValueError(
                f"{self.name}: {len(missing):,} of {len(names):,} pictures are not in "
                f"{Path(self.config.root) / self.config.images}: {few}. Fetch them (docs/benchmarks.md says from "
                f"where), or say evaluation.tasks.{self.name}.images=FOLDER."
            )
