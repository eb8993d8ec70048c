"""Each family's conversation, as its own tokenizer's chat template writes it (chat_templates/, without their tools)."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepstack_pl.batch import IGNORE_INDEX, Role, Turn
from deepstack_pl.language.conversation import IMAGE, TEMPLATES, encode, encode_prompt, render, render_prompt
from deepstack_pl.language.template import UserText

PUBLISHED = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
ENDS = {"llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "mistral_v3": "</s>", "gemma3": "<eos>"}
UNTHOUGHT = "<think>\n\n</think>\n\n"


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Small, with the family's marks as its own tokenizer has them: looks ahead at white space as GPT-2 does."""
    specials = {*TEMPLATES[name].marks, ENDS[name], "<bos>", IMAGE}
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\w+|\s+(?!\S)|\s+|[^\s\w]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[
            AddedToken(t, special="think" not in t, normalized=False)  # Qwen's are added, and not special
            for t in sorted(specials)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What?\n\n\n A  cat\n\n user model\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>" if TEMPLATES[name].bos else None, eos_token=ENDS[name]
    )
    made.chat_template = PUBLISHED[name]
    return made


TOKENIZERS = {name: tokenizer_of(name) for name in PUBLISHED}
SAID = [
    ["What is shown?", "A cat."],
    [f"{IMAGE}\nWhat is shown?", "A  cat,\n\non a mat."],
    ["Hello  there", "Hi", f"{IMAGE}\nAnd now?", "é 😀", "Why?", "Because.\nReally."],
    [f"{IMAGE} and {IMAGE}: which?", "The first"],
    [" ends \n", " are white "],
]


def turns_of(said: list[str]) -> list[Turn]:
    return [Turn((Role.user, Role.assistant)[place % 2], text) for place, text in enumerate(said)]


def published(name: str, turns: list[Turn], *, prompt: bool) -> str:
    messages = [{"role": turn.role.value, "content": turn.text} for turn in turns]
    written = TOKENIZERS[name].apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
    )
    assert isinstance(written, str)
    return written


def ours(name: str, text: str) -> str:
    return ("<bos>" if TEMPLATES[name].bos else "") + text


@pytest.mark.parametrize("said", SAID, ids=range(len(SAID)))
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversation_is_written_as_the_familys_own_chat_template_writes_it(name: str, said: list[str]) -> None:
    template, turns = TEMPLATES[name], turns_of(said)
    expected = published(name, turns, prompt=False)
    found = ours(name, render(turns, template))
    if name == "qwen3":  # its own drops the block from answers that lie back; here each has that it is generated from
        assert found.count(UNTHOUGHT) == len(said) // 2
        found = found.replace(UNTHOUGHT, "", len(said) // 2 - 1)
    assert found == expected.removesuffix("\n")  # what follows the last answer is never read


@pytest.mark.parametrize("said", SAID, ids=range(len(SAID)))
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_the_familys_own_generation_prompt(name: str, said: list[str]) -> None:
    turns = turns_of(said)[:-1]
    expected, found = published(name, turns, prompt=True), ours(name, render_prompt(turns, TEMPLATES[name]))
    if name == "qwen3":
        found = found.replace(UNTHOUGHT, "", len(said) // 2 - 1)
    assert found == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_image_goes_before_its_turns_text_on_a_line_of_its_own(name: str) -> None:
    assert TEMPLATES[name].user_text is UserText.image_first
    assert f"{IMAGE}\nWhat?" in render(turns_of([f"What?\n{IMAGE}", "A cat."]), TEMPLATES[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_learned_is_each_answer_and_the_mark_that_ends_it(name: str) -> None:
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    encoded = encode(turns_of(["What?", "A cat", "And?", " A  dog"]), template, tokenizer)
    learned = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    lead, end = template.answer_lead, template.assistant_suffix
    second = "A  dog" if Role.assistant in template.trimmed else " A  dog"
    assert learned == f"{lead}A cat{end}{lead}{second}{end}"


PIECES = [
    "",
    " ",
    "\n",
    "\n\n",
    "  ",
    "The sign",
    "A",
    "12",
    "\x00",
    "😀",
    "e\u0301",
    "שלום",
    "<",
    IMAGE,
    "<im",
    "age>",
]
PIECES += ["<think>", "</think>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>"]
PIECES += ["<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<|start_header_id|>"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_a_prompt_is_a_prefix_of_what_was_trained_on_and_speakers_write_no_marks(name, texts) -> None:
    template, tokenizer = TEMPLATES[name], TOKENIZERS[name]
    turns = turns_of([text for pair in texts for text in pair])
    encoded, prompt = encode(turns, template, tokenizer), encode_prompt(turns, template, tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encode_prompt(turns[:-1], template, tokenizer) == prompt
    blank = render([Turn(turn.role, "") for turn in turns], template)
    for mark in template.marks:
        assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(mark)) == blank.count(mark)
    assert tokenizer.decode(encoded.input_ids) == ours(name, render(turns, template))
