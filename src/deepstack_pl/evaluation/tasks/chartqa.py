"""ChartQA: questions about charts, written by people or generated from captions (Masry et al., ACL Findings 2022)."""

from deepstack_pl.evaluation.answers import RelaxedAccuracy
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, only_questions, records


def read(config: TaskConfig) -> list[Question]:
    """The questions; ``test_human.json`` gives the kind ``human``, and the published records have no names but their
    places: the key of its first is ``human/0``.
    """
    only_questions(config)

    def question(entry: Entry) -> Question:
        kind = entry.file.stem.rpartition("_")[2]
        return Question(
            key=f"{kind}/{entry.place.removeprefix('record ')}",
            image=entry.picture("imgname"),
            prompt=ask(config, entry.text("query")),
            answers=(entry.word("label"),),
            kind=kind,
        )

    return gather(config, ((entry, question(entry)) for entry in records(config)))


TASK = Task("chartqa", read, RelaxedAccuracy, source="https://github.com/vis-nlp/ChartQA; score: its section 5.1")
