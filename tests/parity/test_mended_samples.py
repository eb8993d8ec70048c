"""What a sample costs, and what is learned of it: E17 and E23 to E25 of method E, where the published code is wrong.

More of E24 and E25, on the published tokenizers, is in tests/language/test_conversation.py.
"""

import pytest
import torch
from ablations import (
    ARMS,
    HD,
    PLAIN,
    L,
    assert_like_the_oracle,
    batch_for,
    collated,
    model_of,
    samples_of,
)
from oracle import forward_slowly, views_slowly
from tiny import MIXED, picture, tiny_llm, tiny_vision

from deepstack_pl.batch import IGNORE_INDEX, PadSide, Record, Role, Turn
from deepstack_pl.data.llava import record_from_llava
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.vision.views import normalise

TEXT, ONE, TWO, WIDE = MIXED
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
TOKENIZER = load_tokenizer(None)


@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_e17_the_likelihood_of_an_answer_needs_nothing_but_the_batch(name: str) -> None:
    """Published: forward wants a list of grids, which lmms-eval's loglikelihood does not pass."""
    model = model_of(PLAIN[name])
    rows = [ONE, TEXT, TWO]
    batch = batch_for(model, rows, PadSide.left)
    batch.labels[:, :-3] = IGNORE_INDEX  # three tokens are the answer
    inputs = {key: value for key, value in batch.model_inputs().items() if key not in ("labels", "position_ids")}
    with torch.no_grad():
        scores = model(**inputs).logits.log_softmax(-1)[:, -4:-1]
        loss = model(**inputs, labels=batch.labels).loss
    found = scores.gather(-1, batch.input_ids[:, -3:, None])[..., 0].sum(1)
    expected = []
    for ids, images in rows:
        with torch.no_grad():
            slow = forward_slowly(model, ids, images)[0].log_softmax(-1)[-4:-1]
        expected.append(sum(float(row[token]) for row, token in zip(slow, ids[-3:], strict=True)))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss, -found.sum() / 9, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["l", "v", "hd", "hires_local", "channels"])
def test_e23_text_alone_costs_no_view_and_a_batch_of_it_one_blank(name: str) -> None:
    """Published: every text sample carries a dummy image, 2 passes of the tower and 10 in HD."""
    made = ARMS[name] if name in ARMS else PLAIN[name]
    model = model_of(made)
    text, image = samples_of(model, [TEXT, ONE])
    assert len(text.views) == 0
    assert len(collated(model, [text, text, text]).views) == 1
    assert len(collated(model, [text, image, text]).views) == len(image.views)
    assert_like_the_oracle(model, [TEXT, TEXT], PadSide.left)


def processor(plan: ModelConfig) -> DeepStackProcessor:
    llm = tiny_llm()
    built = build_plan(plan, llm, tiny_vision())
    return DeepStackProcessor(TOKENIZER, plan=built, vision=tiny_vision(), template="shipped", max_length=512)


@pytest.mark.parametrize("plan", [L, HD], ids=["l", "hd"])
def test_e24_every_answer_is_learned_and_nothing_else_whatever_the_images_take(plan: ModelConfig) -> None:
    """Published: labels are counted in tokens, and a count that is off masks the whole sample in silence."""
    turns = (
        Turn(Role.user, "<image>\nName the colours."),
        Turn(Role.assistant, "red blue"),
        Turn(Role.user, "And <image>?"),
        Turn(Role.assistant, "teal"),
    )
    images = (picture(0, 64, 64), picture(1, 90, 30))
    sample = processor(plan).prepare(Record(key="page", turns=turns, images=images))
    learned = sample.labels[sample.labels != IGNORE_INDEX]
    assert TOKENIZER.decode(learned) == " red blue<eos> teal<eos>"
    assert (sample.labels[sample.token_index >= 0] == IGNORE_INDEX).all()


def test_e25_several_images_of_one_turn_all_stay_and_in_order() -> None:
    """Published: several tags of a turn collapse to one, and a record has one image."""
    made, images = processor(L), [picture(0, 64, 64), picture(1, 90, 30)]
    said = [
        {"from": "human", "value": "Compare <image> with <image>."},
        {"from": "gpt", "value": "Same."},
    ]
    sample = made.prepare(record_from_llava({"conversations": said}, images, "row 7"))
    assert sample.images == 2
    model = model_of(PLAIN["l"])
    for number, image in enumerate(images):
        seen = views_slowly(model, image)
        assert torch.equal(normalise(sample.views, model.config.typed_vision())[number], seen.whole)
    first, second = (sample.token_index[sample.token_index >= 0] == place for place in (0, 16))
    assert first[0]
    assert second[16]
    runs = (sample.token_index[1:] >= 0) & (sample.token_index[:-1] < 0)
    assert runs.sum() == 2, "text stands between the images"
