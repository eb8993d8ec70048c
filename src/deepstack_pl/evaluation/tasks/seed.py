"""SEED-Bench: multiple choice over nine abilities, of its pictures alone (Li et al., CVPR 2024)."""

from pathlib import Path

from deepstack_pl.evaluation.answers import MultipleChoice
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, ask, gather, mapping, only_questions, records

LETTERS = ("A", "B", "C", "D")


def read(config: TaskConfig) -> list[Question]:
    """The questions about pictures; `left_out` counts those about videos. ``{question}`` of the prompt is the question
    with its choices below. The file of a picture is called by its id, without an ending, as it is published.
    """
    only_questions(config)
    abilities = {
        file: {str(number): ability for ability, number in mapping(file, "question_type").items()}
        for file in (Path(config.root) / name for name in config.questions)
    }

    def question(entry: Entry) -> Question:
        choices = tuple(entry.word(f"choice_{letter.lower()}") for letter in LETTERS)
        answer, number = entry.text("answer"), entry.word("question_type_id")
        known = abilities[entry.file]
        if answer not in LETTERS:
            raise entry.bad(f"answer is {answer!r}, which is none of {', '.join(LETTERS)}")
        if number not in known:
            raise entry.bad(f"question_type_id is {number}, which question_type does not list")
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        return Question(
            key=entry.word("question_id"),
            image=entry.picture("data_id"),
            prompt=ask(config, f"{entry.text('question')}\n{options}"),
            answers=(answer,),
            kind=known[number],
            choices=choices,
        )

    asked = (entry for entry in records(config, "questions") if _of_picture(entry))
    return gather(config, ((entry, question(entry)) for entry in asked))


def left_out(config: TaskConfig) -> str:
    """How many questions are about videos, and so not asked; "" where none is."""
    pictures = [_of_picture(entry) for entry in records(config, "questions")]
    videos = len(pictures) - sum(pictures)
    return f"{videos} of {len(pictures)} questions are about videos and are not asked." if videos else ""


def _of_picture(entry: Entry) -> bool:
    data_type = entry.text("data_type")
    if data_type not in ("image", "video"):
        raise entry.bad(f"data_type is {data_type!r}, which is neither image nor video")
    return data_type == "image"


TASK = Task(
    "seed",
    read,
    MultipleChoice,
    source="https://huggingface.co/datasets/AILab-CVC/SEED-Bench; score: letters, as in LLaVA and lmms-eval",
    left_out=left_out,
)
