"""VQA v2.0: questions about COCO's photographs (Goyal et al., CVPR 2017), on its validation split."""

from deepstack_pl.evaluation.answers import VQAv2Accuracy
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, annotations, ask, gather, records


def read(config: TaskConfig) -> list[Question]:
    """The questions, with the answers of the annotation file; its answer types are the kinds."""
    if config.ocr:
        raise ValueError("task vqav2 reads no OCR, but has ocr=True; leave it out.")
    annotated: dict[str, tuple[str, tuple[str, ...]]] = {}
    for entry in annotations(config, "annotations"):
        key, answers = entry.word("question_id"), entry.entries("answers")
        if len(answers) != 10:
            raise entry.bad(f"answers holds {len(answers)} answers, but the score needs 10")
        if key in annotated:
            raise entry.bad(f"a second annotation of question {key!r}, but answers are kept by that name")
        annotated[key] = (entry.text("answer_type"), tuple(answer.word("answer") for answer in answers))

    def question(entry: Entry) -> Question:
        key = entry.word("question_id")
        if key not in annotated:
            raise entry.bad(f"no annotation of question {key}", "give the annotations of the same split")
        kind, answers = annotated[key]
        return Question(
            key=key,
            image=entry.picture("image_id", "COCO_val2014_{:0>12}.jpg"),
            prompt=ask(config, entry.text("question")),
            answers=answers,
            kind=kind,
        )

    return gather(config, ((entry, question(entry)) for entry in records(config, "questions")))


TASK = Task(
    "vqav2", read, VQAv2Accuracy, source="https://visualqa.org/download.html; score: github.com/GT-Vision-Lab/VQA"
)
