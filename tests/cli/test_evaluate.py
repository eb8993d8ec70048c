"""``python evaluate.py`` and ``deepstack compare``: a folder asked benchmarks, and two of them compared."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_files import write_benchmark
from small_run import STACKED, small_model, small_processor
from tiny_run import CONF, start

from deepstack_pl.batch import Refused
from deepstack_pl.cli import main as console
from deepstack_pl.cli.evaluate import main

SHOWN = ("textvqa", "chartqa", "docvqa")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as train.py leaves it, but for its records; and three benchmarks, here."""
    monkeypatch.chdir(tmp_path)
    small_model(STACKED).save_pretrained("run")
    small_processor(STACKED).save_pretrained("run")
    for name in SHOWN:
        write_benchmark(name, tmp_path / "data" / "benchmarks" / name)
    return tmp_path / "run"


def evaluate(*words: str) -> int:
    return main(CONF, ["ckpt=run", *words])


def found(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "evaluation" / name / "results.json").read_text())


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation" / name / "records.jsonl").read_text().splitlines()]


def test_three_benchmarks_are_asked_scored_and_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("evaluation=[textvqa,chartqa,docvqa]") == 0
    for name, metric in zip(SHOWN, ("vqa_accuracy", "relaxed_accuracy", "anls"), strict=True):
        assert found(run, name)["metrics"]["all"]["samples"] == 6
        assert metric in found(run, name)["metrics"]["all"]
        assert [line["index"] for line in records(run, name)] == list(range(6))
    said = capsys.readouterr().out
    assert all(name in said for name in SHOWN)
    assert found(run, "textvqa")["command"] == "python evaluate.py ckpt=run 'evaluation=[textvqa,chartqa,docvqa]'"


def test_the_score_is_what_the_records_give_by_hand(run: Path) -> None:
    evaluate("evaluation=textvqa")
    said = [line["prediction"] for line in records(run, "textvqa")]
    assert all(said)
    file = Path("data/benchmarks/textvqa/TextVQA_0.5.1_val.json")
    values = json.loads(file.read_text())
    for record, people in zip(values["data"], (10, 2, 0, 0, 0, 0), strict=True):
        own = said[values["data"].index(record)]
        record["answers"] = [own] * people + ["nothing that a model says"] * (10 - people)
    file.write_text(json.dumps(values))
    assert evaluate("evaluation=textvqa", "fresh=true") == 0
    assert [line["score"] for line in records(run, "textvqa")] == pytest.approx([1, 0.6, 0, 0, 0, 0])
    assert found(run, "textvqa")["metrics"]["all"]["vqa_accuracy"] == pytest.approx(1.6 / 6)


def test_changed_answers_are_not_taken_for_those_that_were_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    write_benchmark("textvqa", Path("data/benchmarks/textvqa"), samples=5)
    assert evaluate("evaluation=textvqa") == 1
    assert re.search(r"fingerprint was '\w+', is '\w+'.*questions was 6, is 5.*fresh=true", capsys.readouterr().err)


def test_without_injections_answers_are_kept_apart_and_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=[textvqa,chartqa]")
    assert evaluate("evaluation=[textvqa]", "injections=false") == 0
    assert "nothing was stacked" in capsys.readouterr().out
    with_all, without = (
        [line["prediction"] for line in records(run, name)] for name in ("textvqa", "textvqa-no_injections")
    )
    assert with_all != without
    a, b = "run/evaluation/textvqa", "run/evaluation/textvqa-no_injections"
    assert console.main(["compare", a, b, "--to", "page"]) == 0
    assert "injections differs: True and False" in capsys.readouterr().out


def test_a_comparison_shows_what_flipped_with_its_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("data/benchmarks/textvqa/TextVQA_0.5.1_val.json")
    evaluate("evaluation=[textvqa,chartqa]")
    values = json.loads(file.read_text())
    for record, line in zip(values["data"], records(run, "textvqa"), strict=True):
        record["answers"] = [line["prediction"]] * 10
    file.write_text(json.dumps(values))
    evaluate("evaluation=textvqa", "fresh=true")
    evaluate("evaluation=textvqa", "to=other/evaluation", "injections=false")
    Path("other/evaluation/textvqa-no_injections").rename("other/evaluation/textvqa")
    assert console.main(["compare", "run", "other", "--to", "pages"]) == 0
    said = capsys.readouterr().out
    assert "not compared: chartqa, which run alone answered" in said
    page = Path("pages/run--other.html").read_text()
    lost = sum(
        a["prediction"] != b["prediction"]
        for a, b in zip(records(run, "textvqa"), records(Path("other"), "textvqa"), strict=True)
    )
    assert lost
    assert page.count("data:image/jpeg;base64") == lost
    assert f"A is better: {lost} samples" in page


def test_two_folders_with_nothing_in_common_are_not_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    evaluate("evaluation=chartqa", "to=other/evaluation")
    assert console.main(["compare", "run", "other"]) == 1
    assert "run answered textvqa, other chartqa" in capsys.readouterr().err


def test_other_questions_are_not_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    write_benchmark("textvqa", Path("data/benchmarks/textvqa"), samples=4)
    evaluate("evaluation=textvqa", "to=other/evaluation")
    assert console.main(["compare", "run", "other"]) == 1
    assert "were asked different questions" in capsys.readouterr().err


def test_what_differs_and_what_is_few_is_said_beside_a_comparison(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("evaluation=textvqa")
    evaluate("evaluation=textvqa", "to=other/evaluation", "evaluation.tasks.textvqa.max_new_tokens=2")
    assert console.main(["compare", "run", "other"]) == 0
    said = capsys.readouterr().out
    assert "task.max_new_tokens differs: 16 and 2" in said
    assert "3 pictures are too few to say much" in said
    assert "versions" not in said


def test_a_picture_that_cannot_be_shown_takes_no_other_with_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    for name in ("run", "other"):
        place = Path(name) / "evaluation" / "textvqa"
        if name == "other":
            shutil.copytree(run / "evaluation", "other/evaluation")
        lines = [line | {"score": float(name == "run")} for line in records(Path(name), "textvqa")]
        (place / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = records(run, "textvqa")[0]["image"]
    (Path("data/benchmarks/textvqa/train_images") / gone).unlink()
    assert console.main(["compare", "run", "other", "--to", "pages"]) == 0
    assert "2 of 6 pictures cannot be shown" in capsys.readouterr().out
    assert Path("pages/run--other.html").read_text().count("data:image/jpeg;base64") == 4


def test_a_picture_outside_the_benchmarks_folder_is_not_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    shutil.copytree(run / "evaluation", "other/evaluation")
    secret = Path("data/benchmarks/docvqa/documents")
    name = next(secret.iterdir()).name
    for folder, score in (("run", 1.0), ("other", 0.0)):
        file = Path(folder) / "evaluation" / "textvqa" / "records.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[0] |= {"score": score, "image": f"../../docvqa/documents/{name}"}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert console.main(["compare", "run", "other", "--to", "pages"]) == 0
    assert "no file of the benchmark's pictures" in capsys.readouterr().out


def test_names_that_look_like_marks_of_the_terminal_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path("data/benchmarks/chartqa/test")
    (root / "test_human.json").rename(root / "test_[red]x.json")
    words = (
        "evaluation=chartqa",
        "evaluation.tasks.chartqa.questions=['test/test_[red]x.json','test/test_augmented.json']",
    )
    assert evaluate(*words) == 0
    shutil.copytree(run / "evaluation", "other/evaluation")
    assert console.main(["compare", "run", "other"]) == 0
    assert capsys.readouterr().out.count("[red]x") == 2


def test_other_settings_of_generation_are_another_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("evaluation=textvqa")
    file = run / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 5.0}))
    assert evaluate("evaluation=textvqa") == 1
    assert re.search(r"model was '\w+', is '\w+'", capsys.readouterr().err)
    assert evaluate("evaluation=textvqa", "fresh=true", "attention=eager") == 0
    assert evaluate("evaluation=textvqa") == 1
    assert "attention was 'eager', is 'sdpa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "is no run of train.py, and has no held-out samples"),
        (["evaluation=textvqua"], "evaluation=textvqua: no such option; .*Did you mean textvqa?"),
        (["evaluation=quick"], "evaluation=quick: no such option"),
        (["evaluation=pope"], "data/benchmarks/pope/coco_pope_random.json: it cannot be read"),
        (["evaluation=textvqa", "evaluation.tasks.textvqa.rot=x"], "Did you mean evaluation.tasks.textvqa.root?"),
        (["evaluation=textvqa", "evaluation.batch_size=0"], "evaluation.batch_size=0"),
        (["evaluation=textvqa", "device=gpu"], "device=gpu: use auto, cpu or cuda"),
        (["evaluation=textvqa", "dtype=int8"], "dtype=int8: use float32, bfloat16, float16"),
        (["model=baseline"], "Unknown key model"),
        (["-m", "evaluation=textvqa"], "takes one model at a time"),
        (["evaluation=textvqa", "to=run/config.json"], "to=run/config.json is a file"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    run: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*words) == 1
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CONF, [f"ckpt={tmp_path / 'nowhere'}", "evaluation=textvqa"]) == 1
    assert "no model lies there" in capsys.readouterr().err


def test_help_names_every_benchmark() -> None:
    done = subprocess.run([sys.executable, "evaluate.py", "--help"], capture_output=True, text=True, cwd=CONF.parent)
    files = [file for file in (CONF / "evaluation").glob("*.yaml") if "tasks" in yaml.safe_load(file.read_text())]
    assert len(files) == 9
    assert not [file.stem for file in files if not re.search(rf"\b{file.stem}[,;]", done.stdout)]


def test_benchmarks_of_a_run_are_asked_on_the_way_and_whole_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_benchmark("chartqa", tmp_path / "chartqa")
    root, folder = f"evaluation.tasks.chartqa.root={tmp_path / 'chartqa'}", tmp_path / "run"
    words = ("evaluation=[final,chartqa]", "evaluation.every_steps=2", "evaluation.samples=2", root)
    results = start(*words, "evaluation.final_samples=4", "evaluation.max_new_tokens=20", folder=folder)
    assert [set(point) for point in results["curve"]] == [{"step", "coarse", "fine", "chartqa"}]
    assert results["benchmarks"]["chartqa"] == found(folder, "chartqa")["metrics"]
    assert len(records(folder, "chartqa")) == 6
    assert main(CONF, [f"ckpt={folder}", "evaluation=chartqa", root]) == 0  # nothing is left to ask
    assert found(folder, "chartqa")["command"] == "python train.py"


def test_a_runs_own_samples_are_asked_as_its_last_evaluation_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    results = start(folder=folder)
    assert main(CONF, [f"ckpt={folder}"]) == 0
    assert main(CONF, [f"ckpt={folder}"]) == 1  # nothing is written over
    assert main(CONF, [f"ckpt={folder}", "fresh=true"]) == 0
    assert main(CONF, [f"ckpt={folder}", "fresh=true", "evaluation.confidence=0.5"]) == 1  # its own config's
    assert found(folder, "held_out")["metrics"] == results["metrics"]
    again = (folder / "evaluation" / "held_out" / "predictions.jsonl").read_text()
    assert again == (folder / "predictions.jsonl").read_text()
    assert console.main(["compare", str(folder), str(folder / "evaluation" / "held_out")]) == 0


def test_a_picture_that_cannot_be_read_ends_no_run_after_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_benchmark("chartqa", tmp_path / "chartqa")
    spoilt = tmp_path / "chartqa" / config.images / "multi_col_2.png"
    spoilt.write_bytes(spoilt.read_bytes()[:60])
    words = ("evaluation=[final,chartqa]", f"evaluation.tasks.chartqa.root={tmp_path / 'chartqa'}")
    with pytest.raises(Refused, match="cut off or damaged"):  # before the first step, where it is looked at
        start(*words, folder=tmp_path / "first")
    more = ("evaluation.samples=1", "evaluation.final_samples=4", "evaluation.max_new_tokens=20")
    results = start(*words, *more, folder=tmp_path / "run")
    assert results["status"] == "finished"
    assert "cut off or damaged" in results["benchmarks_failed"]["chartqa"]
    assert results["metrics"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_find_what_one_finds(run: Path) -> None:
    assert evaluate("evaluation=[textvqa,chartqa]", "evaluation.batch_size=2") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = ["ckpt=run", "evaluation=[textvqa,chartqa]", "evaluation.batch_size=5", "to=two", "device=cpu"]
    done = subprocess.run(
        [*launch, str(CONF.parent / "evaluate.py"), *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records.jsonl: two/textvqa") == 1
    for name in ("textvqa", "chartqa"):
        both = [run / "evaluation" / name, Path("two") / name]
        one, two = ((place / "records.jsonl").read_text() for place in both)
        assert one == two
        metrics = [json.loads((place / "results.json").read_text())["metrics"] for place in both]
        assert metrics[0] == metrics[1]
