"""LLaVA's conversation format, checked: what a record says becomes turns, or an error that names it."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from deepstack_pl.batch import Reason, Record, Refused, Role, Turn

PLACEHOLDER = "<image>"
ROLES = {"human": Role.user, "gpt": Role.assistant}
TEXT = "text"  # the source of records without an image


def record_from_llava(values: dict[str, Any], images: Sequence[Image.Image], key: str, source: str = "") -> Record:
    """One record, its images decoded, its turns as `check_turns` takes them.

    ``kind`` and ``facts`` are read where the record has them; otherwise its kind is ``answer`` and its last answer is
    the one fact.

    Raises:
        Refused: names ``key``, what is wrong and the remedy.
    """
    turns = check_turns(values, len(images), key)
    kind, facts = values.get("kind", "answer"), values.get("facts", [turns[-1].text])
    return Record(key=key, turns=turns, images=tuple(images), kind=kind, facts=tuple(facts), source=source)


def check_turns(values: dict[str, Any], images: int, key: str) -> tuple[Turn, ...]:
    """The turns of a record with ``images`` images, all shown by human: human and gpt in turn, ending in an answer.

    As published, a leading gpt turn is dropped (it answers nothing), as is a last question that nothing answers, and
    where a single image is asked for several times in one turn, the turn starts with it once.

    Raises:
        Refused: the turns are not such, or ``kind`` and ``facts`` are not.
    """
    conversation = values.get("conversations") if isinstance(values, dict) else None
    if not isinstance(conversation, list):
        raise _bad(f'{key}: no list of "conversations". Write the record in LLaVA\'s format.')
    kind, facts = values.get("kind", ""), values.get("facts", [])
    if not isinstance(kind, str) or not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise _bad(f"{key}: kind is {kind!r}, facts is {facts!r}. Make kind a word and facts a list of strings.")
    turns = [_turn(said, place, key) for place, said in enumerate(conversation)]
    for place, turn in enumerate(turns):
        if turn.role is Role.assistant and PLACEHOLDER in turn.text:
            raise _bad(
                f"{key}: turn {place}, an answer, holds {PLACEHOLDER}: the model is shown images, it writes none. "
                "Move the placeholder to the question, or reword the answer."
            )
    if starts_with_answer(turns):
        turns = turns[1:]
    for place, turn in enumerate(turns):
        if turn.role is not (Role.assistant if place % 2 else Role.user):
            raise _bad(f"{key}: two turns in a row by one speaker. Let human and gpt alternate.")
    if ends_with_question(turns):
        turns = turns[:-1]
    if not turns:
        raise _bad(f"{key}: an empty conversation. Give it a question and an answer, or leave it out.")
    if len(turns) % 2 or not turns[-1].text.strip():
        raise _bad(f"{key}: its last answer is missing or empty. Add it, or leave the record out.")
    several = repeated_placeholder(turns, images)
    if several is not None:
        rest = turns[several].text.replace(PLACEHOLDER, "").strip()
        turns[several] = Turn(Role.user, f"{PLACEHOLDER}\n{rest}")
    asked = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if asked != images:
        raise _bad(
            f"{key}: {asked} {PLACEHOLDER} placeholders in the text, but {images} images. "
            "Write one placeholder for each image, in order."
        )
    return tuple(turns)


def starts_with_answer(turns: Sequence[Turn]) -> bool:
    """Whether the first turn is a gpt turn, which is dropped."""
    return bool(turns) and turns[0].role is Role.assistant


def ends_with_question(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is a question after answers, which is dropped: nothing answers it."""
    return len(turns) > 2 and turns[-1].role is Role.user and PLACEHOLDER not in turns[-1].text


def repeated_placeholder(turns: Sequence[Turn], images: int) -> int | None:
    """The one turn that asks several times for the one image; None where there is no such turn."""
    asking = [place for place, turn in enumerate(turns) if PLACEHOLDER in turn.text]
    return asking[0] if images == len(asking) == 1 and turns[asking[0]].text.count(PLACEHOLDER) > 1 else None


def image_names(values: dict[str, Any], key: str) -> list[str]:
    """The images that a record names, each written one way; a record without any is text-only.

    Raises:
        Refused: no file names, or ones that lead out of the image folder.
    """
    names = values.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _bad(f"{key}: image is {values['image']!r}. Give a file name, or a list of them.")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise _bad(f"{key}: image {name} leaves the image folder. Name images relative to data.images.")
        if not name.isprintable() or not path.parts:
            raise _bad(f"{key}: image {name!r} is no file name. Name images by printable characters.")
    return [str(PurePosixPath(name)) for name in names]


def source_of(values: Any) -> str:
    """The part of its corpus that a record belongs to: the first folder of its first image's path.

    "" where there is no such folder or it is but a number, as in LCS-558K; `TEXT` without an image.
    """
    image = values.get("image") if isinstance(values, dict) else None
    if isinstance(image, list):
        image = image[0] if image else None
    if not image:
        return TEXT
    folder = PurePosixPath(image).parts[0] if isinstance(image, str) and "/" in image else ""
    return folder if folder.isprintable() and not folder.isdecimal() and folder not in ("/", "..", TEXT) else ""


def text_length(values: Any) -> int:
    """Characters of all turns, whatever else is wrong with the record."""
    turns = values.get("conversations") if isinstance(values, dict) else None
    said = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return sum(len(text) for text in said if isinstance(text, str))


def _turn(said: Any, place: int, key: str) -> Turn:
    if not isinstance(said, dict) or not isinstance(said.get("value"), str):
        raise _bad(f'{key}: turn {place} has no text. Write turns as {{"from": "human", "value": "..."}}.')
    speaker = said.get("from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise _bad(f"{key}: turn {place} is from {speaker!r}. Turns are from human or gpt.")
    text = said["value"]
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _bad(
                f"{key}: turn {place} holds half a character, {text[error.start]!r}, at {error.start}. Mend the text, "
                "or leave the record out."
            ) from error
    return Turn(ROLES[speaker], text)


def _bad(sentence: str) -> Refused:
    return Refused(Reason.conversation, sentence)
