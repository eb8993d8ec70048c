"""GQA: questions about scenes and how their objects relate (Hudson, Manning, CVPR 2019)."""

from deepstack_pl.evaluation.answers import ExactMatch
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, keyed, only_questions


def read(config: TaskConfig) -> list[Question]:
    """The questions, which the file keeps by their names."""
    only_questions(config)

    def question(key: str, entry: Entry) -> Question:
        return Question(
            key=key,
            image=entry.picture("imageId", "{}.jpg"),
            prompt=ask(config, entry.text("question")),
            answers=(entry.text("answer"),),
        )

    return gather(config, ((entry, question(key, entry)) for key, entry in keyed(config)))


TASK = Task(
    "gqa",
    read,
    ExactMatch,
    source="https://cs.stanford.edu/people/dorarad/gqa; score: its eval.py, after LLaVA's convert_gqa_for_eval.py",
)
