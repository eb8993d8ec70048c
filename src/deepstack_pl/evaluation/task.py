"""What a benchmark is: samples, what is asked about each, and a score. One file each in ``evaluation.tasks``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepstack_pl.evaluation.config import TaskConfig

if TYPE_CHECKING:
    from deepstack_pl.evaluation.answer_metric import AnswerMetric


@dataclass(frozen=True, slots=True)
class Question:
    """One sample of a benchmark; its picture is still a file.

    Attributes:
        key: the benchmark's own name of it; no two of a task share one.
        image: its picture's file, below the task's folder of pictures.
        prompt: all that is asked, below the picture.
        answers: what is right, as published.
        kind: the published part it belongs to (ChartQA's human and augmented, POPE's samplings, SEED's abilities).
        choices: the options of a multiple choice, in order; the answer is a letter, A for the first.
    """

    key: str
    image: str
    prompt: str
    answers: tuple[str, ...]
    kind: str = ""
    choices: tuple[str, ...] = ()


def _none(_: TaskConfig) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark.

    Attributes:
        read: all its questions, in published order.
        metric: its score.
        source: where its files and its official scorer come from.
        left_out: one sentence about questions of its files that ``read`` leaves out; "" where it leaves out none.
    """

    name: str
    read: Callable[[TaskConfig], list[Question]]
    metric: "type[AnswerMetric]"
    source: str
    left_out: Callable[[TaskConfig], str] = _none
