"""POPE: is an object in the picture, asked of objects that are not (Li et al., EMNLP 2023)."""

from deepstack_pl.evaluation.answers import YesNo
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, lines, only_questions


def read(config: TaskConfig) -> list[Question]:
    """The questions; ``coco_pope_adversarial.json`` gives the kind ``adversarial``, and since files number their
    questions alike, the key of its question 1 is ``adversarial/1``.
    """
    only_questions(config)

    def question(entry: Entry) -> Question:
        kind, label = entry.file.stem.rpartition("_")[2], entry.text("label")
        if label not in ("yes", "no"):
            raise entry.bad(f"label is {label!r}, which is neither yes nor no")
        return Question(
            key=f"{kind}/{entry.word('question_id')}",
            image=entry.picture("image"),
            prompt=ask(config, entry.text("text")),
            answers=(label,),
            kind=kind,
        )

    return gather(config, ((entry, question(entry)) for entry in lines(config)))


TASK = Task("pope", read, YesNo, source="https://github.com/AoiDragon/POPE; score: LLaVA's llava/eval/eval_pope.py")
