"""A request of OpenAI's chat API, field by field. What would change the answer and cannot is refused by its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstack_pl.batch import Record, Role
from deepstack_pl.language.template import IMAGE
from deepstack_pl.multimodal.chat import read_messages
from deepstack_pl.serving.config import Limits, Settings
from deepstack_pl.serving.pictures import bytes_of, decoded
from deepstack_pl.serving.replies import Refusal

# Changes no answer here: who asks, how it is billed or kept.
_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Values that ask for nothing; any other is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_STOP = 1_000  # characters of a stop string, which is looked for after every token
_CHARACTERS = 128  # that a position may stand for: the longest tokens of common vocabularies are as many spaces
_READ = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    *("stream_options", "injections"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request that was found right; ``messages`` are as `read_messages` takes them, pictures still bytes."""

    messages: list[dict[str, Any]]
    settings: Settings
    max_tokens: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool

    def record(self) -> Record:
        """The conversation, with its pictures decoded.

        Raises:
            ValueError: a picture cannot be read, or a template has no such message.
        """
        parts = [part for message in self.messages for part in message["content"] if part["type"] == "image"]
        images = decoded([part["image"] for part in parts])
        for part, image in zip(parts, images, strict=True):
            part["image"] = image
        turns, pictures = read_messages(self.messages)
        if not turns or turns[-1].role is not Role.user:
            raise ValueError("messages end with no question: the last one must be the user's.")
        return Record(key="request", turns=turns, images=pictures)


def read_request(body: Any, *, model: str, limits: Limits, positions: int, root: Path | None) -> Asked:
    """What ``body``, a JSON value, asks of ``model``, whose conversations have at most ``positions``.

    Raises:
        Refusal: a field is wrong, or one that this server does not know.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "The body is no JSON object. Send one with model and messages.")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(value == neutral and type(value) is type(neutral) for neutral in _allowed(name)):
                raise _wrong(name, value, "this server does not do that, and an answer without it would be another one")
        elif name not in _READ | _HARMLESS:
            raise Refusal(400, f"{_short(name)}: this server has no such field. Leave it out.", field=_cut(name))
    name = _typed(given, "model", str, "the name of the model, as /v1/models says it")
    if name != model:
        says = f"model={name!r}: here is {model!r} alone. GET /v1/models lists it."
        raise Refusal(404, says, field="model", code="model_not_found")
    options = _typed(given, "stream_options", dict, "an object", {})
    for option in options.keys() - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", option, "it has include_usage alone")
    stream = _typed(given, "stream", bool, "true or false", False)
    if options and not stream:
        raise _wrong("stream_options", options, "it is for stream=true")
    return Asked(
        messages=_messages(given, limits, positions, root),
        settings=_settings(given),
        max_tokens=_tokens(given, limits.tokens),
        stop=_stop(given.get("stop", ())),
        stream=stream,
        usage=options.get("include_usage") is True,
    )


def _allowed(name: str) -> tuple[Any, ...]:
    """The neutral values, numbers also as floats: JSON writes 0 or 0.0."""
    return tuple(
        each for value in _NEUTRAL[name] for each in ((value, float(value)) if type(value) is int else (value,))
    )


def _wrong(field: str, value: Any, rule: str) -> Refusal:
    return Refusal(400, f"{field}={_short(value)}: {rule}.", field=field)


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _typed(given: dict[str, Any], name: str, kind: type, rule: str, default: Any = ...) -> Any:
    """A field of one type; a number may be whole where it need not be, and true is no number."""
    if name not in given:
        if default is ...:
            raise Refusal(400, f"{name} is missing: {rule}.", field=name)
        return default
    value = given[name]
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(name, value, f"must be {rule}")
    return value


def _settings(given: dict[str, Any]) -> Settings:
    values = {
        "injections": _typed(given, "injections", bool, "true or false", True),
        "temperature": _typed(given, "temperature", float, "a number", 0),
        "top_p": _typed(given, "top_p", float, "a number", 1),
        "seed": _typed(given, "seed", int, "a whole number", None),
    }
    if not values["temperature"]:
        values["seed"] = None  # a greedy answer has no chance in it, and need not wait for one with another seed
    try:
        return Settings(**values)
    except ValueError as error:
        raise Refusal(400, str(error), field=str(error).split("=")[0]) from error


def _tokens(given: dict[str, Any], most: int) -> int:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    values = {_typed(given, name, int, "a whole number") for name in names}
    if len(values) > 1:
        raise _wrong("max_tokens", given["max_tokens"], "max_completion_tokens says another number. Give one of them")
    for value in values:
        if not 1 <= value <= most:
            raise _wrong(names[0], value, f"must be from 1 to {most}, which --max-tokens allows")
    return values.pop() if values else most


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or len(texts) > 4 or not all(isinstance(t, str) and t for t in texts):
        raise _wrong("stop", value, "must be a text, or up to four of them, none empty")
    if (longest := max(map(len, texts), default=0)) > _STOP:
        raise _wrong("stop", value, f"a string of {longest:,} characters is longer than {_STOP:,}. Shorten it")
    return tuple(texts)


def _messages(given: dict[str, Any], limits: Limits, positions: int, root: Path | None) -> list[dict[str, Any]]:
    """The messages as `read_messages` takes them. All are counted before a picture is read or a text tokenised."""
    messages = _typed(given, "messages", list, "a list of messages")
    if not messages:
        raise Refusal(400, "messages is empty: there is nothing to answer. Ask a question.", field="messages")
    if len(messages) > positions:
        says = f"{len(messages):,} messages, but the model's conversations have {positions:,} positions. Begin anew."
        raise Refusal(400, says, field="messages")
    read = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    parts = [part for message in read for part in message["content"]]
    pictures = [part for part in parts if part["type"] == "image"]
    if len(pictures) > limits.images:
        says = f"{len(pictures)} pictures in one conversation; --max-images allows {limits.images}. Send fewer."
        raise Refusal(400, says, field="messages")
    characters = sum(len(part.get("text", "")) + 1 for part in parts)  # each part is a line
    if characters > _CHARACTERS * positions:
        says = (
            f"messages hold {characters:,} characters, and no more than {_CHARACTERS * positions:,} fit into the "
            f"{positions:,} positions of the model's conversations. Questions are never cut: shorten it, or begin anew."
        )
        raise Refusal(400, says, field="messages")
    left = limits.body
    for part in pictures:
        where, url = part["image"]
        try:
            part["image"] = (where, bytes_of(url, where, root=root, most=left))
        except ValueError as error:
            raise Refusal(400, str(error), field=where) from error
        left = max(0, left - len(part["image"][1]))
    return read


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(field, message, "must be an object with role and content")
    for name in sorted(key for key, value in message.items() if value not in (None, [])):
        if name not in ("role", "content"):
            raise Refusal(400, f"{field}, {_short(name)}: templates have no such thing. Leave it out.", field=field)
    parts = message.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, list) or not parts:
        raise _wrong(f"{field}.content", parts, "must be a text, or a list of parts")
    own = [_part(part, f"{field}.content[{number}]") for number, part in enumerate(parts)]
    if message.get("role") == Role.assistant.value:
        if any(part["type"] == "image" for part in own):
            raise Refusal(400, f"{field}: an assistant's message holds text alone. Leave its picture out.", field=field)
    elif any(IMAGE in part.get("text", "") for part in own):
        says = f"{field}: {IMAGE} is where a picture goes, and no word. Send pictures as image_url, or reword the text."
        raise Refusal(400, says, field=field)
    return {"role": message.get("role"), "content": own}


def _part(part: Any, where: str) -> dict[str, Any]:
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise Refusal(400, f"{where}: the text holds half a character: {error}.", field=where) from error
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url), **more}, **rest} if not rest:
            if more.get("detail", "auto") != "auto":
                raise _wrong(f"{where}.image_url.detail", more["detail"], "the plan alone says how a picture is cut")
            if more.keys() - {"detail"}:
                raise _wrong(f"{where}.image_url", sorted(more), "it has url alone")
            return {"type": "image", "image": (where, url)}
        case _:
            rule = "must be {'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}"
            raise _wrong(where, part, rule)
