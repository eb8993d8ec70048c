"""Writes the shipped tokenizer: the same bytes each time it runs (with the tokenizers version in constraints.txt).

The corpus is made here, from lists of words, so that nothing is fetched and nothing is drawn at random. The words that
the fine print set asks for and answers with are frequent enough in it to become one token each, with their leading
space. Digits stay single, so that a number is read as it is written.

    python -m deepstack_pl.language.tokenizer.build
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 512
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "teal")
WEAVES = ("plain", "rows", "columns", "check", "dots", "twill", "herringbone", "basket")
QUESTIONS = ("Name the colours in reading order.", "Name the weaves in reading order.")
EMPHASIS = 60  # how often each fine print word is repeated

_THINGS = ("page", "picture", "table", "sign", "chart", "word", "line", "number", "letter", "photo")
_PLACES = ("left", "right", "top", "middle", "bottom", "corner")
_ASKED = (
    "What is on the {place} of the {thing}?",
    "Where is the {thing}?",
    "How many of them are there in the {thing}?",
    "Which {thing} is at the {place}?",
    "Is there a {thing} at the {place}?",
    "Read the text in the {thing}.",
    "Describe the {thing}.",
    "What does the {thing} say?",
)
_SAID = (
    "The {thing} is at the {place}.",
    "There is one {thing} on the {place} and another below it.",
    "Yes, there are two of them, and they are not the same.",
    "No, it is not there.",
    "It shows what this {thing} has to say for itself.",
    "You can see that the {thing} was made with some care.",
)
_COMMON = (
    "and are as at be but by can do for from had has have he her his how if in into is it its just like more my new "
    "not now of on one only or other our out over she so some than that their them then these they this time to two "
    "under up use was we were what when where which who will with would yes you your three four five six seven eight "
    "nine ten first second third last small large round square dark light person people man woman child dog cat bird "
    "car bus street house tree water food clothes holding standing sitting wearing near behind front between next "
    "image shows answer question using single phrase short describe read text name colour number"
)

# The same string as deepstack_pl.language.conversation.TEMPLATES["shipped"] renders; a test compares the two.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<user>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- if not loop.first -%}
            {{- '<assistant>' -}}
            {%- generation -%}
                {{- ' ' + message['content'] + eos_token -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('The shipped template knows user and assistant, not ' + message['role'] + '.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""


def corpus() -> Iterator[str]:
    """Plain questions and answers, then the fine print words as often as they need."""
    for sentence, thing, place in product(_ASKED + _SAID, _THINGS, _PLACES):
        yield sentence.format(thing=thing, place=place)
    for _ in range(EMPHASIS // 10):
        yield "".join(f" {word}" for word in _COMMON.split())
    for _ in range(EMPHASIS):
        yield from QUESTIONS
        yield "".join(f" {question}" for question in QUESTIONS)
        yield "".join(f" {word}" for word in COLOURS + WEAVES)


def train() -> Tokenizer:
    """Byte-level BPE without a normaliser, so that decoding gives back the text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def build(folder: Path) -> None:
    """Write the tokenizer's three files."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
    }
    folder.mkdir(parents=True, exist_ok=True)
    learnt = json.loads(train().to_str())
    for name, content in (
        ("tokenizer.json", json.dumps(learnt, ensure_ascii=False, indent=1) + "\n"),
        ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
        ("chat_template.jinja", CHAT_TEMPLATE),
    ):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    build(Path(__file__).parent)
