"""Benchmarks asked of a model: in batches, by several starts, and what is kept of the answers."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import write_benchmark
from PIL import Image
from small_run import STACKED, TALKATIVE, small_model, small_processor

from deepstack_pl.batch import Refused
from deepstack_pl.evaluation.asking import ask, ask_and_keep
from deepstack_pl.evaluation.benchmark import Benchmark
from deepstack_pl.evaluation.config import TasksConfig
from deepstack_pl.evaluation.kept import Kept, Others

MADE_BY = {"model": "0123", "dtype": "float32"}
SOME = TasksConfig(batch_size=2)


@pytest.fixture(scope="module")
def model():
    return small_model().eval()


@pytest.fixture
def benchmark(tmp_path):
    return opened(tmp_path / "chartqa")


def opened(folder: Path, name: str = "chartqa", samples: int = 6, **more) -> Benchmark:
    return Benchmark.open(name, replace(write_benchmark(name, folder, samples), max_new_tokens=4, **more))


def opened_again(benchmark: Benchmark) -> Benchmark:
    return Benchmark.open(benchmark.name, benchmark.config)


def keep_in(folder, model, benchmark, **more):
    return ask_and_keep(model, small_processor(), benchmark, SOME, folder, made_by=MADE_BY, facts={}, **more)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


class Stop(Exception):
    """What ends a program in the middle."""


def stop_after(count: int):
    def advance(done: int) -> None:
        nonlocal count
        count -= done
        if count <= 0:
            raise Stop

    return advance


def test_answers_do_not_depend_on_the_batch(tmp_path):
    """Of a model that would answer otherwise were a question's groups another's: without groups it does."""
    benchmark = opened(tmp_path / "chartqa", samples=12)
    model = small_model(STACKED, TALKATIVE).eval()

    def asked(size, **how):
        return ask(model, small_processor(STACKED), benchmark, TasksConfig(batch_size=size), **how)

    one, two, five, all_at_once = (asked(size) for size in (1, 2, 5, 64))
    assert one == two == five == all_at_once
    assert [line.index for line in one] == list(range(12))
    assert [line.key for line in one] == [question.key for question in benchmark.questions]
    without = asked(5, injections=False)
    assert without == asked(1, injections=False)
    assert sum(line.prediction != other.prediction for line, other in zip(one, without, strict=True)) >= 6
    pictures = [line.prediction for line in one[::2]]
    assert len(set(pictures)) >= 4, "six pictures, and what is said hangs on them"


def test_an_answer_is_scored_against_its_own_question(model, benchmark):
    lines = ask(model, small_processor(), benchmark, SOME)
    third = benchmark.questions[2]
    said = replace(
        benchmark,
        questions=(*benchmark.questions[:2], replace(third, answers=(lines[2].prediction,)), *benchmark.questions[3:]),
    )
    scores = [line.score for line in ask(model, small_processor(), said, SOME)]
    assert scores[2] == 1
    assert said.metrics(lines, 0.95)["all"]["relaxed_accuracy"] == sum(scores) / 6


def test_the_first_questions_alone_are_asked(model, benchmark):
    assert [line.index for line in ask(model, small_processor(), benchmark, SOME, first=3)] == [0, 1, 2]


def test_what_was_stopped_goes_on_and_ends_as_if_it_had_not_been(model, benchmark, tmp_path, monkeypatch):
    whole = keep_in(tmp_path / "whole", model, benchmark)
    with pytest.raises(Stop):
        keep_in(tmp_path / "stopped", model, benchmark, advance=stop_after(4))
    assert not (tmp_path / "stopped" / "results.json").exists()
    read = []
    asked = Benchmark.record
    monkeypatch.setattr(Benchmark, "record", lambda self, index: read.append(index) or asked(self, index))
    found = keep_in(tmp_path / "stopped", model, benchmark)
    assert read == [4, 5]
    assert found["answered_before"] == 4
    assert found["metrics"] == whole["metrics"]
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert not list((tmp_path / "stopped").glob("answers.*"))


def test_half_a_line_that_a_kill_left_is_asked_again(model, benchmark, tmp_path):
    with pytest.raises(Stop):
        keep_in(tmp_path / "kept", model, benchmark, advance=stop_after(4))
    file = tmp_path / "kept" / "answers.0.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    assert keep_in(tmp_path / "kept", model, benchmark)["answered_before"] == 3
    assert [line["index"] for line in records(tmp_path / "kept")] == list(range(6))


def test_what_is_answered_is_not_asked_again(model, benchmark, tmp_path, monkeypatch):
    first = keep_in(tmp_path / "kept", model, benchmark)
    monkeypatch.setattr(Benchmark, "record", lambda self, index: pytest.fail("asked again"))
    assert keep_in(tmp_path / "kept", model, benchmark) == json.loads(json.dumps(first))


def test_answers_of_another_model_are_not_gone_on_with(model, benchmark, tmp_path):
    keep_in(tmp_path / "kept", model, benchmark)
    other = {**MADE_BY, "model": "4567"}
    with pytest.raises(ValueError, match=r"model was '0123', is '4567'.*fresh=true"):
        ask_and_keep(model, small_processor(), benchmark, SOME, tmp_path / "kept", made_by=other, facts={})
    more = {"made_by": other, "facts": {}, "others": Others.renamed}
    ask_and_keep(model, small_processor(), benchmark, SOME, tmp_path / "kept", **more)
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["model"] == "4567"
    assert json.loads((tmp_path / "kept" / "before_1" / "results.json").read_text())["model"] == "0123"


def test_answers_to_other_questions_are_not_gone_on_with(model, benchmark, tmp_path):
    keep_in(tmp_path / "kept", model, benchmark)
    with pytest.raises(ValueError, match=r"task\.prompt was .*, is '\{question\}'"):
        keep_in(tmp_path / "kept", model, opened(tmp_path / "chartqa", prompt="{question}"))


def test_two_evaluations_do_not_share_a_folder(model, benchmark, tmp_path):
    other = Kept(tmp_path / "kept", 0)
    other.begin({})
    with pytest.raises(ValueError, match="another evaluation writes there now"):
        keep_in(tmp_path / "kept", model, benchmark)
    other.close()
    keep_in(tmp_path / "kept", model, benchmark, others=Others.all_renamed)


def test_an_evaluation_where_nothing_can_be_locked_goes_on_with_a_warning(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    kept = Kept(tmp_path / "kept", 0)
    kept.begin({})
    kept.close()
    assert (tmp_path / "kept" / "identity.json").is_file()
    assert "kept cannot be locked (No locks available): start nothing there twice" in capsys.readouterr().err


def test_a_question_beyond_the_context_is_named_and_counts_as_not_answered(model, tmp_path):
    long = opened(tmp_path / "chartqa", prompt="{question}" + " again" * 3000)
    found = keep_in(tmp_path / "kept", model, long)
    assert len(found["not_asked"]) == 6
    assert "llm.max_length" in found["not_asked"][0]
    assert {line["prediction"] for line in records(tmp_path / "kept")} == {""}


def test_missing_pictures_are_counted_before_anything_is_asked(tmp_path):
    config = write_benchmark("chartqa", tmp_path)
    for file in sorted((tmp_path / config.images).iterdir())[1:]:
        file.unlink()
    with pytest.raises(ValueError, match=r"2 of 3 pictures are not in .*multi_col_1\.png, multi_col_2\.png"):
        Benchmark.open("chartqa", config)


def test_a_damaged_picture_stops_the_evaluation_by_name_and_loses_nothing(model, tmp_path):
    benchmark = opened(tmp_path / "chartqa")
    file = benchmark.picture(5)
    good = file.read_bytes()
    file.write_bytes(good[:60])
    with pytest.raises(Refused, match=r"cut off or damaged"):
        keep_in(tmp_path / "kept", model, benchmark)
    file.write_bytes(good)
    assert keep_in(tmp_path / "kept", model, benchmark)["answered_before"] == 2


def test_half_a_surrogate_pair_in_a_question_is_kept_as_it_is(model, benchmark, tmp_path):
    first = replace(benchmark.questions[0], answers=("\ud83d",))
    keep_in(tmp_path / "kept", model, replace(benchmark, questions=(first, *benchmark.questions[1:])))
    assert records(tmp_path / "kept")[0]["answers"] == ["\ud83d"]


@pytest.mark.parametrize(
    ("change", "says"), [({"samples": 0}, "samples=0"), ({"max_new_tokens": 0}, "max_new_tokens=0")]
)
def test_numbers_that_ask_nothing_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        Benchmark.open("chartqa", replace(write_benchmark("chartqa", tmp_path), **change))


def test_answers_that_nobody_says_who_made_are_never_taken_over(model, benchmark, tmp_path):
    """A kill while earlier answers are renamed leaves them without their identity."""
    keep_in(tmp_path / "kept", model, benchmark)
    (tmp_path / "kept" / "identity.json").unlink()
    found = ask_and_keep(
        model, small_processor(), benchmark, SOME, tmp_path / "kept", made_by={**MADE_BY, "model": "4567"}, facts={}
    )
    assert (found["model"], found["answered_before"]) == ("4567", 0)
    assert (tmp_path / "kept" / "before_1" / "records.jsonl").is_file()


def test_a_line_of_zeros_that_a_power_cut_left_is_asked_again(model, benchmark, tmp_path):
    with pytest.raises(Stop):
        keep_in(tmp_path / "kept", model, benchmark, advance=stop_after(4))
    with (tmp_path / "kept" / "answers.0.jsonl").open("ab") as file:
        file.write(bytes(40) + b"\n{}\n")
    assert keep_in(tmp_path / "kept", model, benchmark)["answered_before"] == 4


def test_other_pictures_under_the_same_names_are_noticed(model, benchmark, tmp_path):
    with pytest.raises(Stop):
        keep_in(tmp_path / "kept", model, benchmark, advance=stop_after(4))
    Image.new("RGB", (90, 50), "red").save(benchmark.picture(0))
    with pytest.raises(ValueError, match="pictures was"):
        keep_in(tmp_path / "kept", model, opened_again(benchmark))


def test_another_confidence_is_reckoned_from_the_records(model, benchmark, tmp_path):
    keep_in(tmp_path / "kept", model, benchmark)
    half = TasksConfig(batch_size=2, confidence=0.5)
    place = tmp_path / "kept"
    found = ask_and_keep(model, small_processor(), benchmark, half, place, made_by=MADE_BY, facts={})
    assert "ci50" in found["metrics"]["all"]
    assert "ci50" in json.loads((place / "results.json").read_text())["metrics"]["all"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "held_out", "x-no_injections", "n" * 300, "a\0b"])
def test_a_benchmark_is_not_called_what_no_folder_of_its_own_can_be(tmp_path, name):
    with pytest.raises(ValueError, match="results lie in a folder of that name"):
        Benchmark.open(name, write_benchmark("chartqa", tmp_path))


@pytest.mark.parametrize(("kind", "says"), [("all", "'all' is that of all"), ("a\0b", "kinds are printed")])
def test_a_kind_that_would_hide_the_total_or_cannot_be_printed_is_refused(tmp_path, kind, says):
    config = write_benchmark("seed", tmp_path)
    file = tmp_path / config.questions[0]
    values = json.loads(file.read_text())
    values["question_type"] = {
        kind if number == 1 else name: number for name, number in values["question_type"].items()
    }
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        Benchmark.open("seed", config)


def test_a_placeholder_of_pictures_in_a_question_is_refused_with_its_record(tmp_path):
    config = write_benchmark("chartqa", tmp_path)
    file = tmp_path / config.questions[0]
    values = json.loads(file.read_text())
    values[1]["query"] = "What does <image> mean?"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"test_human\.json, record 1.*<image> stands in its question"):
        Benchmark.open("chartqa", config)
