"""TextVQA: questions that need the text in a photograph (Singh et al., CVPR 2019)."""

from deepstack_pl.evaluation.answers import VQAAccuracy
from deepstack_pl.evaluation.config import TaskConfig
from deepstack_pl.evaluation.task import Question, Task
from deepstack_pl.evaluation.tasks.files import Entry, annotations, ask, gather, records


def read(config: TaskConfig) -> list[Question]:
    """The questions, each with the tokens that Rosetta read where ``ocr`` is set.

    As in lmms-eval, a question begins with a capital and goes on in lower case.
    """
    tokens = _tokens(config)

    def question(entry: Entry) -> Question:
        asked = entry.text("question").capitalize()
        if tokens is not None:
            image = entry.word("image_id")
            if image not in tokens:
                raise entry.bad(
                    f"no OCR of picture {image} in {config.annotations}",
                    "give the OCR file of the same split and version, or set ocr=false",
                )
            asked += f"\nReference OCR token: {', '.join(tokens[image])}"
        return Question(
            key=entry.word("question_id"),
            image=entry.picture("image_id", "{}.jpg"),
            prompt=ask(config, asked),
            answers=entry.texts("answers", 10),
        )

    return gather(config, ((entry, question(entry)) for entry in records(config, "data")))


def _tokens(config: TaskConfig) -> dict[str, tuple[str, ...]] | None:
    if not config.ocr:
        if config.annotations:
            raise ValueError(
                f"task textvqa reads annotations={config.annotations} only for OCR tokens, and ocr is false; set "
                "ocr=true, or leave annotations out."
            )
        return None
    found: dict[str, tuple[str, ...]] = {}
    for entry in annotations(config, "data"):
        nothing_read = entry.values.get("ocr_tokens") == []
        found[entry.word("image_id")] = () if nothing_read else entry.texts("ocr_tokens")
    return found


TASK = Task("textvqa", read, VQAAccuracy, source="https://textvqa.org/dataset; score: the challenge's, as in MMF")
