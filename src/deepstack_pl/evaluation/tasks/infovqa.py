"""InfographicVQA: questions about infographics (Mathew et al., WACV 2022)."""

from deepstack_pl.evaluation.answers import ANLS
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, only_questions, records


def read(config: TaskConfig) -> list[Question]:
    """The questions. One may have several answer types, so it is of no kind."""
    only_questions(config)

    def question(entry: Entry) -> Question:
        return Question(
            key=entry.word("questionId"),
            image=entry.picture("image_local_name"),
            prompt=ask(config, entry.text("question")),
            answers=entry.texts("answers"),
        )

    return gather(config, ((entry, question(entry)) for entry in records(config, "data")))


TASK = Task("infovqa", read, ANLS, source="https://rrc.cvc.uab.es/?ch=17 (task 3); score: the challenge's")
