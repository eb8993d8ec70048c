import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PLANS, picture, tiny_llm, tiny_vision

from deepstack_pl.batch import IGNORE_INDEX, PadSide, Reason, Record, Refused, Role, Turn
from deepstack_pl.language.config import TooLong
from deepstack_pl.language.conversation import TEMPLATES, load_tokenizer
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig, build_plan
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig


def llm():
    values = tiny_llm()
    return replace(values, architecture=values.architecture | {"vocab_size": 512})


def processor(
    plan: ModelConfig = PLANS["deepstack_l"], max_length: int = 256, too_long: TooLong = TooLong.cut_text
) -> DeepStackProcessor:
    return DeepStackProcessor(
        load_tokenizer(None),
        plan=build_plan(plan, llm(), tiny_vision()),
        vision=tiny_vision(),
        template="shipped",
        max_length=max_length,
        too_long=too_long,
    )


def model_for(made: DeepStackProcessor, plan: ModelConfig = PLANS["deepstack_l"]) -> DeepStackForConditionalGeneration:
    return build_model(
        plan, llm(), tiny_vision(), ProjectorConfig(name="mlp"), seed=0, image_token_id=made.image_token_id
    ).eval()


def record(text: str, answer: str | None = "red blue", images: int = 1, key: str = "page 7") -> Record:
    turns = (Turn(Role.user, text), *([Turn(Role.assistant, answer)] if answer is not None else []))
    return Record(key=key, turns=turns, images=tuple(picture(i, 64, 64) for i in range(images)))


def test_only_the_answer_is_supervised_and_the_prompt_is_a_prefix_of_the_sample() -> None:
    made = processor()
    sample, prompt = (
        made.prepare(record("<image>\nName the colours.")),
        made.prompt(record("<image>\nName the colours.")),
    )
    assert made.decode(sample.input_ids[sample.labels != IGNORE_INDEX][None])[0].strip() == "red blue"
    assert torch.equal(sample.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert torch.equal(sample.token_index[: len(prompt.token_index)], prompt.token_index)


def test_each_placeholder_becomes_as_many_positions_as_its_image_has_slots() -> None:
    for name, slots in {"baseline": 16, "deepstack_l": 16, "deepstack_v": 16, "long_context": 80}.items():
        sample = processor(PLANS[name]).prepare(record("<image> and <image>", images=2))
        assert (sample.token_index >= 0).sum() == 2 * slots
        assert sample.token_index.max() == 2 * slots - 1
        assert sample.images == 2
        assert len(sample.views) == (2 if name == "baseline" else 10)


@pytest.mark.parametrize(("text", "images"), [("no image", 1), ("<image>", 0), ("<image><image>", 1)])
def test_placeholders_and_images_that_differ_in_number_are_refused_by_key(text: str, images: int) -> None:
    with pytest.raises(ValueError, match=r"sample 'page 7'.* placeholders, but .* images were given") as error:
        processor().prepare(record(text, images=images))
    assert str(text.count("<image>")) in str(error.value)


def test_a_sample_longer_than_the_limit_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"sample 'page 7': \d+ positions, 16 of them visual, but llm.max_length is 20"
    ):
        processor(max_length=20, too_long=TooLong.refuse).prepare(record("<image>\nName the colours in order."))


def test_a_long_answer_is_cut_at_its_end_and_one_of_which_nothing_is_left_is_refused() -> None:
    whole = processor().prepare(record("<image>", "red blue green"))
    cut = processor(max_length=len(whole.labels) - 2).prepare(record("<image>", "red blue green"))
    assert (cut.cut, cut.labels.tolist()) == (2, whole.labels[:-2].tolist())
    with pytest.raises(Refused, match=r"'page 7': \d+ positions, and nothing to learn is left.*max_length=18") as error:
        processor(max_length=18).prepare(record("<image>", "red blue green"))
    assert error.value.reason is Reason.too_long


def test_a_refusal_travels_between_processes_with_its_reason() -> None:
    copy = pickle.loads(pickle.dumps(Refused(Reason.image, "page 7: cannot be read.")))
    assert (type(copy), copy.reason, str(copy)) == (Refused, Reason.image, "page 7: cannot be read.")


@pytest.mark.parametrize("name", ["baseline", "deepstack_l", "long_context"])
def test_positions_are_those_of_the_sample(name: str) -> None:
    made = processor(PLANS[name])
    for text, images in (("<image> and <image>", 2), ("<image>", 1), ("no image", 0)):
        asked = record(text, images=images)
        assert made.positions(asked.turns, [image.size for image in asked.images]) == len(made.prepare(asked).labels)


LONG = "never " * 100_000


def test_a_text_of_a_hundred_thousand_tokens_is_refused_with_both_numbers_and_cut_where_that_is_said() -> None:
    for asked in (record("<image>" + LONG), record("<image>", LONG)):
        with pytest.raises(Refused, match=r"page 7': \d{6} positions, 16 of them visual, but llm\.max_length is 256"):
            processor(too_long=TooLong.refuse).prepare(asked)
    answered = {
        mode: processor(too_long=mode).prepare(record("<image>", LONG)) for mode in (TooLong.cut, TooLong.cut_text)
    }
    for sample in answered.values():
        assert len(sample.input_ids) == 256
        assert sample.cut > 99_000
        assert (sample.token_index >= 0).sum() == 16
        assert (sample.labels != IGNORE_INDEX).sum() > 200
    with pytest.raises(Refused, match=r"page 7': \d{6} positions, and nothing to learn is left.*max_length=256"):
        processor(too_long=TooLong.cut_text).prepare(record("<image>" + LONG))
    asked = processor(too_long=TooLong.cut).prepare(record("<image>" + LONG))  # as published: a row without labels
    assert (len(asked.input_ids), int((asked.labels != IGNORE_INDEX).sum())) == (256, 0)


def test_an_image_takes_as_many_positions_whatever_its_size_where_the_sequence_holds_global_views_alone() -> None:
    for name in ("baseline", "deepstack_l", "deepstack_v"):
        made, asked = processor(PLANS[name]), record("<image>")
        for size in ((1, 1), (16, 16), (90, 30), (1, 20_000), (3000, 2000)):
            sample = made.prepare(replace(asked, images=(picture(0, *size),)))
            assert (sample.token_index >= 0).sum() == 16, (name, size)


def test_a_blank_row_counts_nothing_beside_others_and_alone() -> None:
    made = processor()
    model, sample = model_for(made), made.prepare(record("<image>"))
    refused = made.blank("page 8", "coco", (Reason.image, "page 8: cannot be read."))
    together, alone = made.collate([sample, refused]), made.collate([sample])
    assert together.refused == [None, (Reason.image, "page 8: cannot be read.")]
    assert (together.keys, together.sources) == (["page 7", "page 8"], ["", "coco"])
    with torch.no_grad():
        losses = [model(**batch.model_inputs()).loss for batch in (together, alone)]
        torch.testing.assert_close(*losses)
        assert torch.isfinite(model(**made.collate([refused, made.blank()]).model_inputs()).logits).all()


def test_a_conversation_that_cannot_be_written_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match="page 7"):
        processor().prepare(record("<image>", answer=None))


def test_saved_run_folder_answers_in_a_notebook(tmp_path: Path) -> None:
    made = processor()
    model = model_for(made)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    loaded, again = (
        DeepStackForConditionalGeneration.from_pretrained(tmp_path),
        DeepStackProcessor.from_pretrained(tmp_path),
    )
    inputs = again("<image>\nName the colours.", [picture(0, 64, 64)])
    ids = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = model.generate(
        **made("<image>\nName the colours.", [picture(0, 64, 64)]), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(ids, expected)
    assert "group 0" in loaded.plan.draw()
    assert isinstance(again.decode(ids)[0], str)


def test_several_questions_are_answered_as_each_one_alone() -> None:
    made = processor()
    model = model_for(made)
    questions = ["Say something.", "<image>\nName the colours in reading order.", "<image> or <image>?"]
    images = [[], [picture(0, 64, 64)], [picture(1, 90, 30), picture(2, 30, 60)]]
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = made(questions, images)
    ids = model.generate(**together, **arguments)[:, together["input_ids"].shape[1] :]
    for row, (question, own) in enumerate(zip(questions, images, strict=True)):
        alone = made(question, own)
        assert torch.equal(ids[row], model.generate(**alone, **arguments)[0, alone["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="3 questions, but image lists for 1"):
        made(questions, [[]])
    with pytest.raises(ValueError, match="give each question a list of images"):
        made(["<image>?", "<image>!"], [picture(0, 64, 64)] * 2)


def test_padding_never_points_at_an_image_nor_counts_as_a_label() -> None:
    made = processor()
    rows = [made.prepare(record("<image>\nName the colours in reading order.")), made.prepare(record("Hi.", images=0))]
    for side in PadSide:
        batch = made.collate(rows, side)
        assert (batch.token_index[~batch.attention_mask] == -1).all()
        assert (batch.labels[~batch.attention_mask] == IGNORE_INDEX).all()
        assert batch.attention_mask.sum(1).tolist() == [len(r.input_ids) for r in rows]


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"llm.template=chatty: no such template. There are .*shipped"):
        DeepStackProcessor(
            load_tokenizer(None),
            plan=build_plan(PLANS["deepstack_l"], llm(), tiny_vision()),
            vision=tiny_vision(),
            template="chatty",
            max_length=8,
        )


def test_what_a_sample_is_long_for_is_in_the_digest_of_its_lengths() -> None:
    """Lengths are kept by this digest: those of another plan or template must not be taken for these."""
    one, other, again = processor(), processor(PLANS["long_context"]), processor()
    assert one.positions_digest == again.positions_digest != other.positions_digest
    again.template = TEMPLATES["plain"]
    assert again.positions_digest != one.positions_digest
