"""Tokens to text while they come."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepstack_pl.serving.reading import HALF, Row

END = 0


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen write: every byte is a letter of another alphabet."""
    letters = {letter: number for number, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Phi-3 write: spaces are a letter, and rare characters bytes."""
    pieces = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", *"abcdefgh.,"]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentence_piece()}
TEXTS = st.text(alphabet=st.sampled_from([*"ab .,\n", "é", "€", "漢", "👩", "\u200d", "🏽"]), max_size=24)


def heard(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...] = (), most: int = 10**6
) -> tuple[Row, list[str]]:
    pieces: list[str] = []
    row = Row(tokenizer, {END}, stop=stop, most=most, hear=pieces.append, cancelled=lambda: False)
    for token in [*tokenizer.encode(text, add_special_tokens=False), END, 5]:
        row.write(token)
    return row, pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab. \n€", min_size=1, max_size=3), max_size=3))
def test_pieces_joined_are_the_answer_up_to_the_first_stop_string(kind: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    assert isinstance(whole, str)
    # What is complete first ends it: of "a" and ".aa" in ".aa" the first, though the second begins before it.
    ends = [whole.find(each) + len(each) for each in stop if each in whole]
    written = whole[: min(ends, default=len(whole))]
    cut = min([written.find(each) for each in stop if each in written], default=len(whole))
    row, pieces = heard(tokenizer, text, tuple(stop))
    assert "".join(pieces) == row.text == whole[:cut].strip()
    assert not any(HALF in piece or not piece for piece in pieces)
    assert row.finish == "stop"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_character_is_heard_once_all_its_bytes_are_there(kind: str) -> None:
    _, pieces = heard(TOKENIZERS[kind], "a👩b")
    assert pieces == ["a", "👩", "b"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_never_become_a_character_are_heard_at_the_end(kind: str) -> None:
    tokenizer, pieces = TOKENIZERS[kind], []
    row = Row(tokenizer, {END}, stop=(), most=100, hear=pieces.append, cancelled=lambda: False)
    for token in [*tokenizer.encode("a👩", add_special_tokens=False)[:-1], END]:
        row.write(token)
    assert pieces[0] == "a"
    assert set("".join(pieces[1:])) == {HALF}


def test_a_row_ends_at_its_own_number_of_tokens_and_hears_no_more() -> None:
    row, pieces = heard(TOKENIZERS["byte level"], "abcabc", most=4)
    assert ("".join(pieces), row.finish, row.tokens) == ("abca", "length", 4)


class Counted(str):
    """A stop string that counts the characters of its parts that are looked at."""

    looked_at = 0

    def __getitem__(self, part: Any) -> str:
        found = super().__getitem__(part)
        self.looked_at += len(found)
        return found


def test_a_long_stop_string_costs_no_more_than_the_answer_is_long() -> None:
    tokenizer, counts = TOKENIZERS["byte level"], list[int]()
    token = tokenizer.encode("a", add_special_tokens=False)[0]
    for stop in (Counted("b" * 1_000), Counted("b" * 30_000)):
        row = Row(tokenizer, {END}, stop=(stop,), most=100, hear=lambda text: None, cancelled=lambda: False)
        for _ in range(10):
            row.write(token)
        counts.append(stop.looked_at)
    assert counts[0] == counts[1] > 0


def test_a_row_that_nobody_listens_to_is_over() -> None:
    row = Row(TOKENIZERS["byte level"], {END}, stop=(), most=4, hear=lambda text: None, cancelled=lambda: True)
    row.write(5)
    assert (row.finish, row.text, row.tokens) == ("cancelled", "", 0)
