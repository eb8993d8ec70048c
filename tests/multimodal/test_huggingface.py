"""What plain transformers does with a run's folder once `deepstack_pl.multimodal.auto` is imported."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from saved import CHATS, SMALL, asks, save
from tiny import PLANS
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from deepstack_pl.batch import IGNORE_INDEX, Role, Turn
from deepstack_pl.language.chat_template import chat_template
from deepstack_pl.language.conversation import TEMPLATES, encode, encode_prompt, load_tokenizer, render, render_prompt
from deepstack_pl.multimodal.auto import DeepStackConfig, DeepStackForConditionalGeneration, DeepStackProcessor

PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
TO_ANSWER = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> DeepStackProcessor:
    return AutoProcessor.from_pretrained(folder)


def test_the_documented_snippet_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = PAGE.split("```python\n")[1].split("```")[0]
    assert len(snippet.strip().splitlines()) <= 10
    save(tmp_path / "outputs" / "RUN")
    SMALL.save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "huggingface.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['")


def test_auto_classes_load_what_was_saved(folder: Path, processor: DeepStackProcessor) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is DeepStackConfig
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is DeepStackForConditionalGeneration
    assert type(processor) is DeepStackProcessor
    assert (processor.image_token, processor.image_token_id) == ("<image>", load_tokenizer(None).vocab["<image>"])
    assert "deepstack_l" in repr(processor)
    with pytest.raises(TypeError, match="colour"):
        processor("Hi.", colour=True)


def test_inputs_hold_what_forward_takes_padded_on_the_left(processor: DeepStackProcessor) -> None:
    inputs = processor.apply_chat_template(CHATS, **TO_ANSWER)
    names = ["input_ids", "attention_mask", "views", "token_index", "sequence_rows", "group_rows", "vit_rows"]
    assert sorted(inputs) == sorted(names) == sorted(processor.model_input_names)
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"][1, 0]
    assert inputs.to("cpu", dtype=torch.bfloat16)["views"].dtype is torch.uint8


def test_messages_are_the_turns_they_stand_for(processor: DeepStackProcessor, tmp_path: Path) -> None:
    """A part is a line; where an image comes from does not matter."""
    SMALL.save(tmp_path / "a.png")
    expected = processor("<image>\nName the colours.", [SMALL])
    path = str(tmp_path / "a.png")
    for source in ({"image": SMALL}, {"image": path}, {"path": path}, {"url": path}):
        messages = [
            {"role": "user", "content": [{"type": "image", **source}, asks("Name the colours.")[0]["content"][0]]}
        ]
        inputs = processor.apply_chat_template(messages, **TO_ANSWER)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    asked = processor.apply_chat_template([{"role": "user", "content": "Hi."}], **TO_ANSWER)
    assert torch.equal(asked["input_ids"], processor("Hi.")["input_ids"])


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_saved_chat_template_writes_what_the_template_does(name: str, tmp_path: Path) -> None:
    """Any program that reads chat_template.jinja gets the string, the ids and the answers that were trained on."""
    template, tokenizer = TEMPLATES[name], load_tokenizer(None)
    tokenizer.add_tokens(list(template.marks), special_tokens=True)
    plan = DeepStackProcessor.from_pretrained(save(tmp_path / "run")).plan
    made = DeepStackProcessor(
        tokenizer, plan=plan, vision=DeepStackConfig.from_pretrained(tmp_path / "run").typed_vision(), template=name,
        max_length=99,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert "{%- generation -%}" in (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8")
    bos = tokenizer.bos_token if template.bos else ""
    for texts in (
        [
            '<image>\nWhat "is"\n{{ this }}?  ',
            " red",
            "And\t<image> that? ",
            " \nteal 'é' \n",
            "<image><image>Last\\n?",
        ],
        ["<image>"],
        [" look <image> here "],
    ):
        turns = [Turn((Role.user, Role.assistant)[i % 2], text) for i, text in enumerate(texts)]
        for said in (turns, [Turn(Role.assistant, "Hello."), *turns]):
            messages = [{"role": turn.role.value, "content": turn.text} for turn in said]
            string = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert string == bos + render_prompt(said, template)
            assert string == made.apply_chat_template(messages, add_generation_prompt=True)
            ids = encode_prompt(said, template, tokenizer)
            assert plain.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
            if len(texts) > 1:
                whole = plain.apply_chat_template(messages[:-1], tokenize=False)
                assert whole == bos + render(said[:-1], template)
                out = plain.apply_chat_template(messages[:-1], return_dict=True, return_assistant_tokens_mask=True)
                learned = [label != IGNORE_INDEX for label in encode(said[:-1], template, tokenizer).labels]
                assert [bool(mark) for mark in out["assistant_masks"]] == learned


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_chat_template_refuses_what_the_template_does(name: str) -> None:
    made = load_tokenizer(None)
    made.chat_template = chat_template(TEMPLATES[name])
    user, answer = {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "red"}
    for messages, says in (
        ([user, user], "Two turns in a row by the user"),
        ([answer, answer, user], "Two turns in a row by the assistant"),
        ([answer], "no question"),
        ([{"role": "system", "content": "Be brief."}, user], "system text belongs to the template"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a text or an image"),
        ([user, answer], "ends with an answer"),
    ):
        with pytest.raises(Exception, match=says):
            made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_written_prompt_gives_the_ids_of_its_conversation(processor: DeepStackProcessor) -> None:
    """The two ways of Hugging Face: messages at once, or the string first and the images beside it."""
    images = [[part["image"] for m in chat for part in m["content"] if "image" in part] for chat in CHATS]
    strings = processor.apply_chat_template(CHATS, add_generation_prompt=True)
    at_once = processor.apply_chat_template(CHATS, **TO_ANSWER)
    in_two = processor(text=strings, images=images, return_tensors="pt", padding=True)
    assert at_once.keys() == in_two.keys()
    assert all(torch.equal(at_once[name], in_two[name]) for name in at_once)
    alone = processor.apply_chat_template(CHATS[0], add_generation_prompt=True)
    assert alone == strings[0]
    assert torch.equal(processor(text=alone, images=SMALL)["views"], processor("<image>", [SMALL])["views"])


def test_an_answered_conversation_is_written_whole(processor: DeepStackProcessor) -> None:
    chat = [*CHATS[0], {"role": "assistant", "content": "red"}]
    ids = processor.apply_chat_template(chat, tokenize=True)
    turns = [Turn(Role.user, "<image>\nName the colours."), Turn(Role.assistant, "red")]
    expected = encode(turns, processor.template, processor.tokenizer).input_ids
    assert [i for i in ids[0].tolist() if i != processor.image_token_id] == [
        i for i in expected if i != processor.image_token_id
    ]
    with pytest.raises(ValueError, match="conversation 0 ends with an answer"):
        processor.apply_chat_template(chat, **TO_ANSWER)
    with pytest.raises(ValueError, match="ends with a question: say True"):
        processor.apply_chat_template(CHATS[0], tokenize=True)


@pytest.mark.parametrize(
    "image", ["https://example.org/a.png", "http://[::1]/a", "file:///a.png", "data:image/png;base64,AAAA", 7]
)
def test_nothing_is_fetched_for_a_prompt(image: str, processor: DeepStackProcessor, monkeypatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("was opened"))
    with pytest.raises(ValueError, match="nothing is fetched"):
        processor.apply_chat_template(asks("What?", image), **TO_ANSWER)


def test_messages_that_mean_nothing_are_refused_in_a_sentence(processor: DeepStackProcessor, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    for messages, says in (
        (
            asks("What?", tmp_path / "bomb.png"),
            "cannot be read: .*an image of 9000 x 9000 pixels; at most 64,000,000 are decoded",
        ),
        (asks("What?", tmp_path / "none.png"), "cannot be read"),
        (asks("What?", tmp_path / "a.txt"), "cannot be read"),
        ([{"role": "system", "content": "Be brief."}], "role 'system'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "has the part"),
        ([{"role": "user", "content": [{"type": "image"}]}], "with 0 images"),
        (asks("<image> What?", SMALL), "holds 2 image placeholders, but 1 images"),
    ):
        with pytest.raises(ValueError, match=says):
            processor.apply_chat_template(messages, **TO_ANSWER)
    with pytest.raises(ValueError, match="padded torch tensors"):
        processor.apply_chat_template(CHATS[0], **(TO_ANSWER | {"return_tensors": "np"}))


def test_a_tokenizers_own_chat_template_does_not_outlive_the_models(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None)
    tokenizer.chat_template = "another"
    model = AutoModelForImageTextToText.from_pretrained(save(tmp_path))
    vision = model.config.typed_vision()
    DeepStackProcessor(tokenizer, plan=model.plan, vision=vision, template="shipped", max_length=9).save_pretrained(
        tmp_path
    )
    assert "another" not in (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")


def test_transformers_own_pipeline_answers_as_generate_does(folder: Path, processor: DeepStackProcessor) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    (out,) = ask(text=CHATS[0], return_full_text=False, generate_kwargs=settings)
    inputs = processor.apply_chat_template(CHATS[0], **TO_ANSWER)
    ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert out["generated_text"] == processor.decode(ids)[0] == processor.decode(ids[0])


@pytest.mark.parametrize("name", list(PLANS))
def test_a_folder_answers_as_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    save(tmp_path, PLANS[name])
    model, made = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = made.apply_chat_template(CHATS, **TO_ANSWER)
    blind = inputs | {"views": 255 - inputs["views"]}
    with torch.no_grad():
        seen, other = model(**inputs).logits[:, -1], model(**blind).logits[:, -1]
    changed = (seen - other).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, True, True]  # the second asks about no image
