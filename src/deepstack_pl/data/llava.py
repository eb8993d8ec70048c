"""LLaVA's conversation format, checked: what a record says becomes turns, or an error that names it."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deepstack_pl.batch import Record, Role, Turn

PLACEHOLDER = "<image>"
ROLES = {"human": Role.user, "gpt": Role.assistant}


def record_from_llava(values: dict[str, Any], images: Sequence[Image.Image], key: str) -> Record:
    """One record, its images decoded. A leading gpt turn is dropped: it answers nothing.

    ``kind`` and ``facts`` are read where the record has them; otherwise its kind is ``answer`` and its last answer is
    the one fact.

    Raises:
        ValueError: names ``key``, what is wrong and the remedy.
    """
    turns = check_turns(values, len(images), key)
    kind, facts = values.get("kind", "answer"), values.get("facts", [turns[-1].text])
    if not isinstance(kind, str) or not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
        raise ValueError(f"{key}: kind is {kind!r}, facts is {facts!r}. Make kind a word and facts a list of strings.")
    return Record(key=key, turns=turns, images=tuple(images), kind=kind, facts=tuple(facts))


def check_turns(values: dict[str, Any], images: int, key: str) -> tuple[Turn, ...]:
    """The turns of a record with ``images`` images, all shown by human: human and gpt in turn, ending in an answer."""
    conversation = values.get("conversations") if isinstance(values, dict) else None
    if not isinstance(conversation, list):
        raise ValueError(f'{key}: no list of "conversations". Write the record in LLaVA\'s format.')
    turns = [_turn(said, place, key) for place, said in enumerate(conversation)]
    for place, turn in enumerate(turns):
        if turn.role is Role.assistant and PLACEHOLDER in turn.text:
            raise ValueError(
                f"{key}: turn {place}, an answer, holds {PLACEHOLDER}: the model is shown images, it writes none. "
                "Move the placeholder to the question, or reword the answer."
            )
    if turns and turns[0].role is Role.assistant:
        turns = turns[1:]
    for place, turn in enumerate(turns):
        if turn.role is not (Role.assistant if place % 2 else Role.user):
            raise ValueError(f"{key}: two turns in a row by one speaker. Let human and gpt alternate.")
    if not turns:
        raise ValueError(f"{key}: an empty conversation. Give it a question and an answer, or leave it out.")
    if len(turns) % 2 or not turns[-1].text.strip():
        raise ValueError(f"{key}: its last answer is missing, so there is nothing to learn. Add it, or leave it out.")
    asked = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if asked != images:
        raise ValueError(
            f"{key}: {asked} {PLACEHOLDER} placeholders in the text, but {images} images. "
            "Write one placeholder for each image, in order."
        )
    return tuple(turns)


def _turn(said: Any, place: int, key: str) -> Turn:
    if not isinstance(said, dict) or not isinstance(said.get("value"), str):
        raise ValueError(f'{key}: turn {place} has no text. Write turns as {{"from": "human", "value": "..."}}.')
    speaker = said.get("from")
    if speaker not in ROLES:
        raise ValueError(f"{key}: turn {place} is from {speaker!r}. Turns are from human or gpt.")
    return Turn(ROLES[speaker], said["value"])
