"""What is learned of a conversation, character by character: random dialogues, all templates, kinds of tokenizers."""

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepstack_pl.batch import IGNORE_INDEX, Role, Turn
from deepstack_pl.language.conversation import IMAGE, TEMPLATES, Template, encode, encode_prompt

KINDS = ("merges across words", "merges within words", "unigram with bytes", "bytes alone")
CORPUS = [
    f"{a}{b}{c}"
    for a in ("What is it?", "USER: a", "\n\n ")
    for b in ("A  cat", " ASSISTANT: The", "é漢")
    for c in ".\n"
]
PIECES = ["", " ", "\n", "\n\n", "  ", "\t", "\x00", "The", "A", ": ", "12", "ASSISTANT:", "USER: ", "model\n"]
PIECES += ["😀", "👩\u200d🚀", "e\u0301", "שלום", "مرحبا", "\u202e", "漢字", "\ufeff", "\xa0", "\u2028"]
PIECES += ["<", "<eos>", "</s>", "<|end|>", "<|im_end|>", "[/INST]", "<end_of_turn>", "<|eot_id|>", "<im", "age>"]
TEXT = st.one_of(st.text(max_size=10), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
TEXT = TEXT.map(lambda text: text.replace(IMAGE, "")).filter(lambda text: IMAGE not in text)


@cache
def tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A small one with the template's marks."""
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<s>", IMAGE, *TEMPLATES[template].marks)]
    letters = pre_tokenizers.ByteLevel.alphabet()
    if kind == "unigram with bytes":
        pieces = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
        pieces += [("▁", -3.0), ("▁A", -3.5), ("A", -4.0), ("▁The", -3.5), (":", -4.0), ("?", -4.0), ("?▁A", -2.0)]
        made = Tokenizer(models.Unigram([("<unk>", -20.0), *pieces], unk_id=0, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.add_special_tokens(marks)
    else:
        made = Tokenizer(models.BPE())
        regex = kind != "merges across words"
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
        made.decoder = decoders.ByteLevel()
        size = 0 if kind == "bytes alone" else 700
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=marks, initial_alphabet=letters, show_progress=False, min_frequency=1
        )
        made.train_from_iterator(CORPUS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<s>")


def bytes_of(token: str, kind: str, special: bool) -> bytes:
    """What a token stands for."""
    if special:
        return token.encode()
    if kind == "unigram with bytes":
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    return b"".join(_BYTE[letter] for letter in token)


def _letters() -> dict[str, bytes]:
    """GPT-2's alphabet: a letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {
        chr(256 + place): bytes([byte]) for place, byte in enumerate(others)
    }


_BYTE = _letters()


def expected(turns: list[Turn], template: Template) -> list[tuple[str, bool]]:
    """Each character and whether it is learned, written down turn by turn."""
    found: list[tuple[str, bool]] = []

    def write(text: str, learned: bool) -> None:
        found.extend((character, learned) for character in text)

    write(template.system, False)
    for place, turn in enumerate(turns):
        text = turn.text.strip() if turn.role in template.trimmed else turn.text
        if turn.role is Role.user:
            if place:
                write(template.between, False)
            if template.name == "plain":
                text = IMAGE
            elif IMAGE in text and template.name != "shipped":
                text = (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()
            write(template.user_prefix + text + template.user_suffix + template.assistant_prefix, False)
        else:
            write(template.answer_lead + text + template.assistant_suffix, True)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(said=st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=6))
def test_what_is_learned_is_the_answers_and_their_ends_character_by_character(
    name: str, kind: str, said: list[tuple[str, str, bool]]
) -> None:
    template, words = TEMPLATES[name], tokenizer(kind, name)
    turns: list[Turn] = []
    for question, answer, shown in said:
        image = IMAGE if shown or name == "plain" else ""
        turns += [Turn(Role.user, image + question), Turn(Role.assistant, answer)]
    encoded = encode(turns, template, words)
    ids, labels = encoded.input_ids, encoded.labels
    if template.bos:
        assert (ids[0], labels[0]) == (words.bos_token_id, IGNORE_INDEX)
        ids, labels = ids[1:], labels[1:]
    got: list[tuple[int, bool]] = []
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        text = words.convert_ids_to_tokens(token)
        assert isinstance(text, str)
        whole = bytes_of(text, kind, token in words.all_special_ids or text == IMAGE)
        got += [(byte, label != IGNORE_INDEX) for byte in whole]
    wanted = [(byte, learned) for character, learned in expected(turns, template) for byte in character.encode()]
    assert got == wanted
    prompt = encode_prompt(turns, template, words)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORE_INDEX for label in encoded.labels[len(prompt) - 1 : len(prompt)])
