"""Conversations as Hugging Face writes them: messages to turns and images, and a `Template` as a Jinja chat template.

Every part of a message is a line: ``[{"type": "image"}, {"type": "text", "text": "What is this?"}]`` is the turn
``<image>\\nWhat is this?``, as corpora write it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from deepstack_pl.batch import Record, Refused, Role, Turn
from deepstack_pl.language.conversation import encode, encode_prompt, encode_written
from deepstack_pl.language.template import IMAGE, Template
from deepstack_pl.vision.images import decode_image

Message = Mapping[str, Any]
Images = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]
Asked = tuple[Record, list[int]]
_SOURCES = ("image", "path", "url")


def questions(
    text: str | Sequence[str], images: Images | None, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[Asked]:
    """Each text with its images: a question, or a prompt that stands in the template already.

    Raises:
        ValueError: not a list of images for each text.
    """
    texts = [text] if isinstance(text, str) else list(text)
    given = [] if images is None else [images] if isinstance(images, Image.Image) else images
    rows: list[Any] = [given] if isinstance(text, str) else list(given) or [()] * len(texts)
    if any(isinstance(row, Image.Image) for row in rows):
        raise ValueError("images: give each question a list of images, also where it holds one: [image].")
    if len(rows) != len(texts):
        raise ValueError(f"{len(texts)} questions, but image lists for {len(rows)}. Give each question its own list.")
    asked: list[Asked] = []
    for number, (question, row) in enumerate(zip(texts, rows, strict=True)):
        turns = (Turn(Role.user, question),)
        written = _is_written(question, template, tokenizer)
        ids = encode_written(question, template, tokenizer) if written else encode_prompt(turns, template, tokenizer)
        asked.append((Record(key=f"question {number}", turns=turns, images=tuple(row)), ids))
    return asked


def conversations(
    rows: Sequence[Sequence[Message]], template: Template, tokenizer: PreTrainedTokenizerBase, *, to_answer: bool
) -> list[Asked]:
    """Each conversation: to be answered, or as a whole.

    Raises:
        ValueError: it ends with an answer and is to be answered, or neither.
    """
    asked: list[Asked] = []
    for number, messages in enumerate(rows):
        turns, images = read_messages(messages)
        answered = bool(turns) and turns[-1].role is Role.assistant
        if answered == to_answer:
            ends = "an answer: leave one of them out" if answered else "a question: say True to have it answered"
            raise ValueError(f"add_generation_prompt={to_answer}, but conversation {number} ends with {ends}.")
        ids = encode(turns, template, tokenizer).input_ids if answered else encode_prompt(turns, template, tokenizer)
        asked.append((Record(key=f"conversation {number}", turns=turns, images=images), ids))
    return asked


def _is_written(text: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``text`` stands in ``template`` already; of one that writes nothing before a question none is held to."""
    opening = template.system + template.user_prefix
    bos = tokenizer.bos_token if template.bos and isinstance(tokenizer.bos_token, str) else ""
    return bool(opening) and text.removeprefix(bos).startswith(opening)


def read_messages(messages: Sequence[Message]) -> tuple[tuple[Turn, ...], tuple[Image.Image, ...]]:
    """The turns of one conversation, and its images in the order in which they stand there.

    Raises:
        ValueError: a role or part that no template has, or an image that is not there or not on this machine.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in (Role.user.value, Role.assistant.value):
            raise ValueError(
                f"Message {place} has the role {role!r}, but templates have user and assistant alone. A template's "
                "system text is its own: leave the message out."
            )
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        lines: list[str] = []
        before = len(images)
        for part in parts:
            match part:
                case {"type": "text", "text": str(text)}:
                    lines.append(text)
                case {"type": "image"}:
                    lines.append(IMAGE)
                    images.append(_image(part, place))
                case _:
                    raise ValueError(
                        f"Message {place} has the part {part!r}. A part is {{'type': 'text', 'text': ...}}, or "
                        "{'type': 'image', 'image': ...} with a PIL image or the path of a file."
                    )
        shows = len(images) > before
        turns.append(Turn(Role(role), "\n".join(lines), plain=role == Role.assistant.value and not shows))
    return tuple(turns), tuple(images)


def without_images(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same messages for a Jinja template, which writes images and does not look at them."""
    return [
        {**message, "content": [{**part, **{s: None for s in _SOURCES if s in part}} for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _image(part: Mapping[str, Any], place: int) -> Image.Image:
    """An image as training reads it: no EXIF rotation. Nothing is fetched: a prompt must not make requests."""
    given = [part[source] for source in _SOURCES if part.get(source) is not None]
    if len(given) != 1:
        raise ValueError(f"Message {place} has an image part with {len(given)} images: give one, under 'image'.")
    (image,) = given
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path) or "://" in str(image) or str(image).startswith("data:"):
        raise ValueError(
            f"Message {place} has the image {str(image)[:80]!r}, but nothing is fetched or decoded from a text here. "
            "Give a PIL image, or the path of a file."
        )
    try:
        return decode_image(Path(image).read_bytes(), str(image))
    except (OSError, Refused) as error:
        raise ValueError(f"Message {place} has the image {str(image)!r}, which cannot be read: {error}") from error
