"""The model of lmms-eval: as a class, and as its program runs it on a task of one's own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2
from small_run import STACKED, Pages, small_model, small_processor

from deepstack_pl.batch import PadSide, Record, Role, Turn
from deepstack_pl.evaluation.lmms import DeepStackChat, DeepStackSimple
from deepstack_pl.evaluation.runner import generate

PAGES = 6
WORDS = ("red", "teal", "navy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms") / "run"
    small_model(STACKED).save_pretrained(folder)
    small_processor(STACKED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(folder: Path) -> DeepStackChat:
    return DeepStackChat(str(folder), device="cpu", batch_size=4)


def question(number: int) -> Record:
    """A page as it is asked: picture, line, words."""
    page = Pages()[number]
    text = page.turns[0].text.replace("<image>", "").strip()
    return Record(key=str(number), turns=(Turn(Role.user, f"<image>\n{text}"),), images=page.images)


def answers(model: Any, numbers: range, length: int = 8, **options: Any) -> list[str]:
    """What our own generation says, one by one."""
    return [generate(model.model, model.processor, [question(n)], length, **options)[0] for n in numbers]


def requests(settings: Callable[[int], dict[str, Any]], numbers: range, messages: Any = None) -> list[Instance]:
    def to_messages(number: int) -> list[dict[str, Any]]:
        asked = question(number)
        parts = [{"type": "image", "url": asked.images[0]}, {"type": "text", "text": asked.turns[0].text[8:]}]
        return [{"role": "user", "content": parts}]

    given = messages or to_messages
    return [
        Instance(
            request_type="generate_until",
            arguments=("x" * n, given, settings(n), n, "pages", "test"),
            idx=0,
            metadata={"task": "pages", "doc_id": n, "repeats": 1},
        )
        for n in numbers
    ]


def ask(model: DeepStackChat, *args: Any) -> list[str]:
    model.task_dict = {"pages": {"test": range(PAGES)}}
    return [result.text for result in model.generate_until(requests(*args))]


def greedy(number: int) -> dict[str, Any]:
    return {"max_new_tokens": 8, "temperature": 0}


def test_lmms_eval_finds_it_by_its_entry_point() -> None:
    assert MODEL_REGISTRY_V2.get_model_class("deepstack_pl") is DeepStackChat
    assert MODEL_REGISTRY_V2.get_model_class("deepstack_pl", force_simple=True) is DeepStackSimple


def test_answers_in_batches_are_those_of_one_by_one_in_the_order_of_the_requests(chat: DeepStackChat) -> None:
    assert ask(chat, greedy, range(PAGES)) == answers(chat, range(PAGES))
    assert len(set(answers(chat, range(PAGES)))) > 1


def test_each_request_is_answered_by_its_own_settings(chat: DeepStackChat) -> None:
    found = ask(chat, lambda n: {"max_new_tokens": 2 + n % 2 * 6}, range(PAGES))
    assert found == [answers(chat, range(n, n + 1), 2 + n % 2 * 6)[0] for n in range(PAGES)]


def test_an_answer_ends_before_the_first_stop_string(chat: DeepStackChat) -> None:
    whole = answers(chat, range(1))[0]
    stop = whole[len(whole) // 2 :][:2]
    assert ask(chat, lambda n: {**greedy(n), "until": [stop, "nowhere"]}, range(1)) == [whole.split(stop)[0].strip()]


def test_without_injections_answers_are_those_of_the_text_sequence(folder: Path) -> None:
    bare = DeepStackChat(str(folder), device="cpu", batch_size=4, injections=False)
    assert ask(bare, greedy, range(PAGES)) == answers(bare, range(PAGES), injections=False)
    assert ask(bare, greedy, range(PAGES)) != answers(bare, range(PAGES))


def test_a_text_that_says_where_pictures_stand_is_taken_at_its_word(chat: DeepStackChat) -> None:
    def to_messages(number: int) -> list[dict[str, Any]]:
        asked = question(number)
        parts = [{"type": "image", "url": asked.images[0]}, {"type": "text", "text": asked.turns[0].text}]
        return [{"role": "user", "content": parts}]

    assert ask(chat, greedy, range(2), to_messages) == answers(chat, range(2))


def test_a_setting_that_is_not_read_is_refused_and_one_of_llavas_is_told_of_once(
    chat: DeepStackChat, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="repetition_penalty, which deepstack_pl does not read"):
        ask(chat, lambda n: {"repetition_penalty": 1.2}, range(1))
    with pytest.raises(ValueError, match="temperature='hot': use a number"):
        ask(chat, lambda n: {**greedy(n), "temperature": "hot"}, range(1))
    for _ in range(2):
        ask(chat, lambda n: {**greedy(n), "image_aspect_ratio": "pad"}, range(2))
    assert capsys.readouterr().out.count("image_aspect_ratio=pad is not read") == 1


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "video", "url": "clip.mp4"}, "'video'"),
        ({"type": "image", "url": "https://x.org/a.png"}, "nothing is fetched"),
    ],
)
def test_what_it_cannot_see_is_refused_with_the_sample(chat: DeepStackChat, part: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ask(chat, greedy, range(1), lambda n: [{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conv_template": "vicuna_v1"}, r"conv_template=vicuna_v1: the model in .* learned shipped"),
        ({"convtemplate": "shipped"}, r"Did you mean conv_template\?"),
        ({"dtype": "int8"}, "dtype=int8: use float32, bfloat16, float16"),
        ({"batch_size": "auto"}, "--batch_size auto"),
        ({"pretrained": "nowhere"}, "pretrained=nowhere: no model lies there"),
        ({"max_batch_size": 8}, "--max_batch_size 8"),
        ({"injections": "no"}, "injections=no: use True or False"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(folder: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DeepStackChat(**{"pretrained": str(folder), "device": "cpu", **given})


@pytest.mark.parametrize(("learned", "other"), [("vicuna_v1", "phi3_instruct"), ("phi3_instruct", "vicuna_v1")])
def test_the_published_names_of_templates_are_taken_where_the_model_learned_them(
    folder: Path, tmp_path: Path, learned: str, other: str
) -> None:
    taught = shutil.copytree(folder, tmp_path / "run")
    values = json.loads((taught / "config.json").read_text()) | {"template": learned}
    (taught / "config.json").write_text(json.dumps(values))
    assert DeepStackChat(str(taught), conv_template=learned, device="cpu").processor.template.name == learned
    with pytest.raises(ValueError, match=f"conv_template={other}: the model in .* learned {learned}"):
        DeepStackChat(str(taught), conv_template=other, device="cpu")


def test_a_choice_has_the_mean_loss_of_its_own_words_and_their_end(folder: Path) -> None:
    model = DeepStackSimple(str(folder), device="cpu", batch_size=4)
    model.task_dict = {"pages": {"test": range(PAGES)}}
    context = question(0).turns[0].text.removeprefix("<image>\n")
    places = [(n, word) for n in range(2) for word in (*WORDS, "red teal")]
    asked = [
        Instance(
            request_type="loglikelihood",
            arguments=(context, f" {word}", lambda doc: list(question(doc).images), n, "pages", "test"),
            idx=0,
            metadata={"task": "pages", "doc_id": n, "repeats": 1},
        )
        for n, word in places
    ]
    for (n, word), wrapped in zip(places, model.loglikelihood(asked), strict=True):
        found, likeliest = wrapped.text
        turns = (Turn(Role.user, f"<image>\n{context}"), Turn(Role.assistant, word))
        processor = model.processor
        whole = processor.prepare(Record(key="", turns=turns, images=question(n).images))
        alone = processor.prompt(Record(key="", turns=turns[:1], images=question(n).images))
        batch = processor.collate([whole], PadSide.right)
        inputs = {name: value for name, value in batch.model_inputs().items() if name != "labels"}
        with torch.no_grad():
            logits = model.model(**inputs).logits[0].log_softmax(-1)
        ids = whole.input_ids[len(alone.input_ids) :].tolist()
        assert processor.tokenizer.decode(ids[:-1]).strip() == word  # the last one ends an answer
        spots = range(len(alone.input_ids), len(whole.input_ids))
        by_hand = [float(logits[spot - 1, token]) for spot, token in zip(spots, ids, strict=True)]
        assert found == pytest.approx(-sum(by_hand) / len(ids), abs=1e-4)
        assert likeliest == all(int(logits[s - 1].argmax()) == t for s, t in zip(spots, ids, strict=True))


def write_tasks(place: Path, said: list[str]) -> None:
    """A data set of pages as files of parquet, and two tasks on it: say the colours, choose one."""
    right = [said[n] if n in (0, 2, 3) else "nothing of the kind" for n in range(PAGES)]
    rows = [
        {
            "image": q.images[0],
            "question": q.turns[0].text.removeprefix("<image>\n"),
            "answer": answer,
            "choice": WORDS[0],
        }
        for q, answer in ((question(n), right[n]) for n in range(PAGES))
    ]
    kinds = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    kinds |= {"choice": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(str(place / "pages.parquet"))
    tasks = place / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    head = (
        f"dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {place / 'pages.parquet'}\n"
        'test_split: test\ndoc_to_visual: !function utils.pictures\ndoc_to_text: "{{question}}"\n'
    )
    ends = "    aggregation: mean\n    higher_is_better: true\n"
    (tasks / "say.yaml").write_text(
        f"task: pages_say\n{head}output_type: generate_until\ndoc_to_target: answer\n"
        f"generation_kwargs:\n  max_new_tokens: 8\nmetric_list:\n  - metric: exact_match\n{ends}"
    )
    (tasks / "choose.yaml").write_text(
        f"task: pages_choose\n{head}output_type: multiple_choice\ndoc_to_target: choice\n"
        f"doc_to_choice: {json.dumps(WORDS)}\nmetric_list:\n  - metric: acc\n{ends}"
    )


def lmms_eval(folder: Path, place: Path, name: str, tasks: str, *words: str, launch: tuple[str, ...] = ("-m",)) -> Any:
    """The real program; results, and by task its samples."""
    args = ["--model", "deepstack_pl", "--model_args", f"pretrained={folder},conv_template=shipped"]
    args += ["--tasks", tasks, "--include_path", str(place / "tasks"), "--device", "cpu"]
    args += ["--output_path", str(place / name), "--log_samples", *words]
    command = [sys.executable, *launch, "lmms_eval", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=280)
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (place / name).rglob("*_results.json")
    samples = {}
    for each in (place / name).rglob("*_samples_*.jsonl"):
        task = re.sub(r".*_samples_(.*)\.jsonl", r"\1", each.name)
        samples[task] = sorted((json.loads(line) for line in each.read_text().splitlines()), key=lambda s: s["doc_id"])
    return json.loads(file.read_text())["results"], samples


@pytest.mark.slow
def test_the_program_scores_a_task_of_ones_own_as_is_right_by_hand(
    chat: DeepStackChat, folder: Path, tmp_path: Path
) -> None:
    said = answers(chat, range(PAGES))
    write_tasks(tmp_path, said)
    one, samples = lmms_eval(folder, tmp_path, "one", "pages_say", "--batch_size", "1")
    assert one["pages_say"]["exact_match,none"] == pytest.approx(3 / PAGES)
    assert [sample["filtered_resps"] for sample in samples["pages_say"]] == said
    both, again = lmms_eval(folder, tmp_path, "both", "pages_say,pages_choose", "--batch_size", "4", "--force_simple")
    assert both["pages_say"]["exact_match,none"] == one["pages_say"]["exact_match,none"]
    assert [s["filtered_resps"] for s in again["pages_say"]] == [s["filtered_resps"] for s in samples["pages_say"]]
    losses = [[float(one_of[0]) for one_of in sample["filtered_resps"]] for sample in again["pages_choose"]]
    assert both["pages_choose"]["acc,none"] == pytest.approx(
        sum(min(range(3), key=each.__getitem__) == 0 for each in losses) / PAGES
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_a_task_out(
    chat: DeepStackChat,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = answers(chat, range(PAGES))
    write_tasks(tmp_path, said)
    # `accelerate launch --cpu` starts one process, whatever it is told.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    found, samples = lmms_eval(folder, tmp_path, "two", "pages_say", "--batch_size", "2", launch=launch)
    assert "deepstack_pl: 100%" in (told := capfd.readouterr().err)
    assert f"{PAGES // 2}/{PAGES // 2}" in told  # the first one's share is half
    assert f"{PAGES}/{PAGES} [" not in told.split("deepstack_pl:", 1)[1].split("Postprocessing")[0]
    assert found["pages_say"]["exact_match,none"] == pytest.approx(3 / PAGES)
    assert [sample["filtered_resps"] for sample in samples["pages_say"]] == said
