"""Runs as a study: arms and seeds found from what was typed, the page, the command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deepstack_pl.cli.main import main
from deepstack_pl.cli.study import read_study
from deepstack_pl.cli.study_charts import READINGS, figures, front, svg
from deepstack_pl.cli.study_page import commands, table_of, write_page
from deepstack_pl.evaluation.paired import Difference

STEPS = (10, 20)


def leave(
    folder: Path, arm: list[str], seed: int, right: list[int], *, plan: str = "deepstack_l", **changes: Any
) -> None:
    """A finished run: of each sample's four fine facts so many are right."""
    folder.mkdir(parents=True)
    share = sum(right) / (4 * len(right))
    results = {
        "status": "finished",
        "seed": seed,
        "arm": arm,
        "plan": {"name": plan, "injections": []},
        "metrics": {"fine": {"accuracy": share, "ci95": [share - 0.1, share + 0.1], "samples": len(right)}},
        "curve": [{"step": step, "fine": share * step / 20} for step in STEPS],
        "tokens_per_image": {"seen": 80, "context": 16},
        "parameters": {"total": 1_000_000},
        "flops": 4.0e12,
        "peak_memory_bytes": {"process_peak": 2_000_000_000},
        "tokens_per_second": 1000.0,
        "seconds": {"train": 100.0},
        "steps": 20,
        "data": {"order_digest": f"order {seed}", "fingerprint": {"val": "v"}},
        "init_digest": {"llm": f"weights {seed}"},
        "architecture_digest": {"llm": "L"},
        "starts": [{"command": "python train.py -m <model>", "step": 0}],
        "device": "cpu",
        "versions": {"torch": "2"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        {"key": f"page {n}", "kind": "fine", "correct": [True] * value + [False] * (4 - value)}
        for n, value in enumerate(right)
    ]
    (folder / "predictions.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two start layers, two seeds; the points were typed with a word in common."""
    folder = tmp_path / "sweep"
    for layer, right in ((8, [2, 2, 1, 2]), (1, [4, 3, 4, 4])):
        for seed in (0, 1):
            words = ["experiment=x", f"model.start_layer={layer}", f"seed={seed}"]
            leave(folder / f"model.start_layer={layer},seed={seed}", words, seed, right[seed:] + right[:seed])
    return folder


def test_arms_are_named_by_what_differs_and_hold_their_seeds(sweep: Path) -> None:
    study = read_study([sweep])
    assert [(arm.name, sorted(arm.runs)) for arm in study.arms] == [
        ("model.start_layer=1", [0, 1]),
        ("model.start_layer=8", [0, 1]),
    ]
    assert study.swept == "model.start_layer"
    assert study.arms[0].accuracy("fine") == pytest.approx(15 / 16)
    assert study.arms[0].on_the_way("fine") == pytest.approx(15 / 16 * 0.75)


def test_differences_are_paired_by_sample_and_seed_against_the_arm_that_is_named(sweep: Path) -> None:
    found = read_study([sweep], against="8").differences("fine")
    assert list(found) == ["model.start_layer=1"]
    (difference,) = found.values()
    assert isinstance(difference, Difference)
    assert difference.delta == pytest.approx(8 / 16)
    assert (difference.seeds, difference.samples) == (2, 4)


def test_the_baseline_is_what_others_are_held_against(tmp_path: Path) -> None:
    leave(tmp_path / "a", ["model=deepstack_l"], 0, [4])
    leave(tmp_path / "b", ["model=baseline"], 0, [1], plan="baseline")
    study = read_study([tmp_path])
    assert study.against.name == "model=baseline"
    assert study.swept is None


def test_a_first_stage_of_its_own_is_no_part_of_an_arms_name(tmp_path: Path) -> None:
    for plan in ("baseline", "dummy"):
        leave(tmp_path / plan, [f"model={plan}", f'init_from="FIRST/model={plan}"'], 0, [1], plan=plan)
    assert [arm.name for arm in read_study([tmp_path]).arms] == ["model=baseline", "model=dummy"]


def test_runs_of_other_samples_or_seeds_are_not_compared_and_say_why(tmp_path: Path) -> None:
    leave(tmp_path / "a", ["model=baseline"], 0, [1, 2], plan="baseline")
    leave(tmp_path / "b", ["model=deepstack_l"], 0, [1, 2, 3])
    leave(tmp_path / "c", ["model=dummy"], 5, [1, 2])
    found = read_study([tmp_path]).differences("fine")
    assert "other samples" in str(found["model=deepstack_l"])
    assert "one arm has seeds [5], the other [0]" in str(found["model=dummy"])


def test_facts_that_not_every_run_was_asked_are_named_and_not_compared(tmp_path: Path) -> None:
    leave(tmp_path / "a", ["model=baseline"], 0, [1], plan="baseline")
    metrics = {kind: {"accuracy": 1.0, "ci95": [0.9, 1.0], "samples": 1} for kind in ("fine", "coarse")}
    leave(tmp_path / "b", ["model=dummy"], 0, [4], metrics=metrics)
    study = read_study([tmp_path])
    assert study.kinds == ["fine"]
    assert study.left == ["not compared: coarse, which not every run was asked"]


def test_who_did_not_finish_is_listed_and_in_no_number(sweep: Path) -> None:
    left = sweep / "model.start_layer=50,seed=0"
    left.mkdir()
    (left / "results.json").write_text(json.dumps({"status": "failed", "reason": "too deep", "arm": []}))
    study = read_study([sweep])
    assert len(study.arms) == 2
    assert study.left == ["failed: model.start_layer=50,seed=0: too deep"]


def test_what_a_point_left_before_it_was_begun_anew_is_no_arm(sweep: Path) -> None:
    os.rename(sweep / "model.start_layer=8,seed=1", sweep / ".model.start_layer=8,seed=1.before-1")
    assert [len(arm.runs) for arm in read_study([sweep]).arms] == [2, 1]


def test_single_runs_are_a_study_too(sweep: Path) -> None:
    runs = [sweep / "model.start_layer=1,seed=0", sweep / "model.start_layer=8,seed=0"]
    assert [arm.name for arm in read_study(runs).arms] == ["model.start_layer=1", "model.start_layer=8"]
    assert [arm.name for arm in read_study(runs[:1]).arms] == ["deepstack_l"]


def test_the_page_needs_no_other_file_and_shows_what_was_typed_as_text(sweep: Path) -> None:
    study = read_study([sweep])
    write_page(study, sweep)
    page = (sweep / "report.html").read_text()
    assert page.count("<svg") == len(figures(study)) == 3
    for outside in ("<script", "<link", "src=", "@import"):
        assert outside not in page
    assert "&lt;model&gt;" in page
    assert "third-party readings by eye, unverified" in page
    assert "0123456789ab" in page
    text = (sweep / "report.md").read_text()
    assert "| model.start_layer=8 | 0.438" in text
    assert "-0.500 [" in text
    assert "- all arms: same samples in the same order for each seed" in text
    assert commands(study) == ["python train.py -m <model>"]


def test_one_seed_says_that_another_ones_luck_is_not_in_its_interval(tmp_path: Path) -> None:
    leave(tmp_path / "a", ["model=baseline"], 0, [1, 2], plan="baseline")
    leave(tmp_path / "b", ["model=deepstack_l"], 0, [4, 4])
    table = table_of(read_study([tmp_path]), "fine")
    assert "another seed's luck" in table.note
    assert table.rows[0][2] == ""
    assert table.rows[1][2].startswith("+0.625 [")


def test_the_same_study_gives_the_same_picture(sweep: Path) -> None:
    study = read_study([sweep])
    assert [svg(f) for f in figures(study).values()] == [svg(f) for f in figures(study).values()]


def test_readings_of_the_papers_figure_stand_beside_what_was_swept_only(tmp_path: Path) -> None:
    for value in (1, 2):
        leave(tmp_path / f"{value}", [f"optim.weight_decay={value}"], 0, [value])
    (first, *_) = figures(read_study([tmp_path])).values()
    assert "third-party" not in svg(first)
    assert set(READINGS) == {"model.start_layer", "model.interval", "model.groups"}


def test_the_front_is_of_points_that_none_beats() -> None:
    points = [(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (3.0, 0.5), (4.0, 0.9)]
    assert front(points, more_is_worse=True) == [(1.0, 0.2), (2.0, 0.5), (4.0, 0.9)]
    assert front(points, more_is_worse=False) == [(4.0, 0.9)]


def test_the_command_writes_the_page_and_says_what_it_found(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep), "--to", str(sweep / "there")]) == 0
    said = capsys.readouterr().out
    assert "4 finished runs in 2 arms, compared with model.start_layer=1" in said
    assert "fine, model.start_layer=8: 0.438" in said
    assert (sweep / "there" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere"], "there is no such folder"),
        (["empty"], "no finished run"),
        (["sweep", "--against", "nobody"], "no finished arm of that name"),
    ],
)
def test_nothing_to_report_is_said_in_a_sentence(
    words: list[str], why: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / words[0]), *words[1:]]) == 1
    assert why in capsys.readouterr().err
