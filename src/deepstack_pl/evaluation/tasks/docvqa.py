"""DocVQA: questions about scanned pages (Mathew et al., WACV 2021)."""

from pathlib import PurePosixPath

from deepstack_pl.evaluation.answers import ANLS
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, only_questions, records


def read(config: TaskConfig) -> list[Question]:
    """The questions. Pictures are published as ``documents/NAME.png``, but unpack into folders of other names: what is
    kept is NAME.png, below the images folder. A question may be of several types, so it is of no kind.
    """
    only_questions(config)

    def question(entry: Entry) -> Question:
        return Question(
            key=entry.word("questionId"),
            image=PurePosixPath(entry.picture("image")).name,
            prompt=ask(config, entry.text("question")),
            answers=entry.texts("answers"),
        )

    return gather(config, ((entry, question(entry)) for entry in records(config, "data")))


TASK = Task("docvqa", read, ANLS, source="https://rrc.cvc.uab.es/?ch=17 (task 1); score: the challenge's")
