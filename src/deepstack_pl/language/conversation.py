"""Conversations to tokens: what is said, what is learned, and where the images stand.

A template is a value: the strings around each turn. ``render`` writes a conversation with it, ``encode`` tokenises it
with labels, ``encode_prompt`` stops where the answer is to be generated.

Labels come from spans. The rendered string is a row of spans, given or learned (an answer with what ends it), and a
token belongs to the span its characters lie in. The string is tokenised as a whole, from image to image (as the
published code does); where a token would straddle the border of a span, the string is cut there and the rest tokenised
by itself. That choice at a border looks only at the text up to the end of the next span, so a prompt's ids are a
prefix of the ids it was trained with, whatever the tokenizer merges.

Text of a speaker is never read as a special token: a string such as ``<eos>`` in it is cut after its first character.
So is ``<image>`` where the turn is ``plain``; elsewhere it stands for the next image.

    >>> from deepstack_pl.batch import Role, Turn
    >>> turns = [Turn(Role.user, "<image>Name the colours."), Turn(Role.assistant, "red teal")]
    >>> tokenizer, template = load_tokenizer(None), TEMPLATES["shipped"]
    >>> render(turns, template)
    '<user><image>Name the colours.<assistant> red teal<eos>'
    >>> encoded = encode(turns, template, tokenizer)
    >>> tokenizer.decode([id for id in encoded.labels if id != IGNORE_INDEX])
    ' red teal<eos>'
    >>> encoded.input_ids[: len(encoded.input_ids) - 3] == encode_prompt(turns, template, tokenizer)
    True
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deepstack_pl.batch import IGNORE_INDEX, Turn
from deepstack_pl.language.template import (
    IMAGE,
    TEMPLATES,
    Span,
    Template,
    prompt_spans,
    render,
    render_prompt,
    spans_of,
)

__all__ = [
    "IMAGE",
    "TEMPLATES",
    "Encoded",
    "Template",
    "encode",
    "encode_prompt",
    "encode_written",
    "image_token_id",
    "load_tokenizer",
    "render",
    "render_prompt",
    "save_tokenizer",
]

_SHIPPED = Path(__file__).parent / "tokenizer"
_SENTENCE = "A chat: <image>\nWhat, in 2024, is THIS? ASSISTANT: a  cat.</s> <|end|>\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids and unshifted labels of one conversation; each ``<image>`` is still one token, and is never learned."""

    input_ids: list[int]
    labels: list[int]


def encode(turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The whole conversation, with labels on its answers."""
    spans = spans_of(turns, template)
    if not spans[-1].learned:
        raise ValueError(f"Turn {spans[-1].turn} (user) has no answer to learn from. End the conversation with one.")
    ids = _opening(template, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    image = image_token_id(tokenizer)
    for span, new in _tokens(spans, template, tokenizer):
        learned = [token if span.learned and token != image else IGNORE_INDEX for token in new]
        if span.learned and all(label == IGNORE_INDEX for label in learned):
            raise ValueError(
                f"Turn {span.turn} (assistant), {span.text!r}, has no token to learn. Give it text, or template "
                f"{template.name!r} an assistant_suffix."
            )
        ids += new
        labels += learned
    return Encoded(ids, labels)


def encode_prompt(turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The conversation up to its last user turn, ready for generation: a prefix of what ``encode`` gives."""
    spans = prompt_spans(turns, template)
    return _opening(template, tokenizer) + [token for _, new in _tokens(spans, template, tokenizer) for token in new]


def encode_written(text: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt that stands in ``template`` already, with or without the tokenizer's bos token before it.

    Who wrote what can no longer be told: special tokens count wherever they stand.
    """
    if template.bos and isinstance(tokenizer.bos_token, str):
        text = text.removeprefix(tokenizer.bos_token)
    span = Span(0, learned=False, text=text, own=((0, len(text)),))
    return _opening(template, tokenizer) + [token for _, new in _tokens([span], template, tokenizer) for token in new]


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands for an image; it may lie beyond the LLM's vocabulary, as its embedding is never looked up."""
    return _token_id(IMAGE, tokenizer, "Load the tokenizer with load_tokenizer, which adds it.")


def load_tokenizer(path: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer at ``path`` (a folder or a name on the Hugging Face hub), or the shipped one for None.

    ``options`` are transformers' own, as ``revision``.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(_SHIPPED) if path is None else path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_not_loaded(path, error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"The tokenizer at {path!r} is a {type(tokenizer).__name__}, but only fast tokenizers are supported. "
            "Convert it to one with a tokenizer.json."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer at {path!r} has no pad, unk or eos token. Set pad_token in its config.")
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write ``tokenizer`` so that `load_tokenizer` gives it again, id for id.

    transformers 5 reads ``legacy`` (how text after a special token begins) from a tokenizer's settings, and does not
    save it.

    Raises:
        ValueError: the saved tokenizer gives other ids.
    """
    tokenizer.save_pretrained(folder)
    settings = Path(folder) / "tokenizer_config.json"
    if "legacy" in vars(tokenizer):
        said = json.loads(settings.read_text(encoding="utf-8")) | {"legacy": vars(tokenizer)["legacy"]}
        settings.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer.encode(_SENTENCE) != load_tokenizer(str(folder)).encode(_SENTENCE):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} gives other ids once saved: transformers' "
            f"{type(tokenizer).__name__} does not keep it whole. Give one with a tokenizer.json."
        )


def _not_loaded(path: str | None, error: Exception) -> str:
    if path is not None and Path(path).is_dir():
        return (
            f"The folder {path!r} holds no tokenizer that can be read. It needs a tokenizer.json, or a tokenizer.model "
            "and a sentencepiece that fits protobuf (pip install -e . -c constraints.txt). "
            f"{_first_line(error)}"
        )
    return (
        f"No tokenizer at {path!r}: there is no such folder, and the Hugging Face hub, where published ones come from, "
        f"gives none of that name (or there is no network). Fetch it with `hf download {path}` where there is one, or "
        "give a folder that holds it. llm.init=random needs none: it uses the tokenizer that ships with the package."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _token_id(token: str, tokenizer: PreTrainedTokenizerBase, remedy: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no token {token!r}. {remedy}")
    return found


def _opening(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before the rendered string; refuses a tokenizer that does not know the template's marks."""
    for mark in template.marks:
        _token_id(
            mark,
            tokenizer,
            f"Template {template.name!r} needs it: choose the llm.template made for this tokenizer "
            "(llm.template=shipped for the one that ships with the package).",
        )
    if not template.bos:
        return []
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int):
        raise ValueError(
            f"Template {template.name!r} starts with a beginning-of-sequence token, but the tokenizer "
            f"{tokenizer.name_or_path!r} has none. Use a template with bos=False."
        )
    return [bos]


def _tokens(
    spans: Sequence[Span], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Span, list[int]]]:
    """Each span with its ids.

    ``text`` is the open stretch: what has been tokenised as a whole since the last image or cut, with ``ids``. Every
    piece lengthens it, and where the ids so far do not stay as they are, the stretch is closed before the piece.
    """
    special = _special_strings(template, tokenizer)
    text, ids = "", []
    for span in spans:
        new: list[int] = []
        for piece, starts_afresh in _pieces(span, special):
            if starts_afresh:
                text, ids = "", []
            if piece == IMAGE:
                new.append(image_token_id(tokenizer))
                continue
            longer = _ids(text + piece, tokenizer)
            if longer[: len(ids)] != ids:
                text, ids, longer = "", [], _ids(piece, tokenizer)
            new += longer[len(ids) :]
            text, ids = text + piece, longer
        yield span, new


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False)


def _special_strings(template: Template, tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds, at every place, what the tokenizer would read as a special token."""
    strings = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings |= {*tokenizer.all_special_tokens, *template.marks}
    strings -= {IMAGE}
    return re.compile(f"(?=({'|'.join(re.escape(s) for s in sorted(strings, key=len, reverse=True))}))")


def _pieces(span: Span, special: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The span cut at its images and inside special strings that the template did not put there.

    The second value says that tokenising starts afresh at the piece.
    """
    cuts = set()
    for match in special.finditer(span.text):
        start, stop = match.span(1)
        if stop - start > 1 and not any(first <= start and stop <= last for first, last in span.own):
            cuts.add(start + 1)
    images = [match.start() for match in re.finditer(IMAGE, span.text)]
    cuts |= {edge for start in images for edge in ((start + 1,) if span.plain else (start, start + len(IMAGE)))}
    edges = sorted(cuts | {0, len(span.text)})
    for start, stop in pairwise(edges):
        yield span.text[start:stop], start in cuts
