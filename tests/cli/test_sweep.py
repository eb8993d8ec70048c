"""The report over a sweep's arms, from made-up results."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from tiny_run import leave_checkpoint

from deepstack_pl.cli.arms import fairness, read_arms
from deepstack_pl.cli.report import duration, print_report, write_failure
from deepstack_pl.cli.sweep import SweepReport, report

TRAINED = {"samples": 9, "sources": {}, "refused": {}, "cut_samples": 0, "cut_positions": 0, "cut_answers": 0}
DATA = {"name": "x", "order_digest": "order", "trained": TRAINED, "fingerprint": {"train": "t", "val": "v"}}


def results(accuracy: float, **changes: Any) -> dict[str, Any]:
    kind = {"accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "exact_match": 0.1}
    return {
        "status": "finished",
        "seed": 0,
        "device": "cpu",
        "versions": {},
        "starts": [{"command": "python train.py -m"}],
        "metrics": {"coarse": {**kind, "facts": 10, "samples": 2}, "fine": {**kind, "facts": 10, "samples": 2}},
        "plan": {"name": "deepstack_l", "injections": ["group 0 -> llm layer 1"]},
        "tokens_per_image": {"seen": 80, "context": 16},
        "parameters": {"total": 1_657_824, "trained": 1_600_000},
        "seconds": {"train": 272.0, "evaluate": 9.0},
        "tokens_per_second": 2345.0,
        "steps": 300,
        "max_steps": 300,
        "interrupted": False,
        "init_from": None,
        "data": DATA,
        "init_digest": {"vision": "v", "projector": "p", "llm": "l"},
        "architecture_digest": {"vision": "V", "projector": "P", "llm": "L"},
        **changes,
    }


def a_sweep(folder: Path, arms: dict[str, dict[str, Any]]) -> Path:
    for place, (name, found) in enumerate(arms.items()):
        (folder / name).mkdir(parents=True)
        file = folder / name / "results.json"
        file.write_text(json.dumps({"arm": [name], **found}))
        os.utime(file, (place, place))
    return folder


def test_one_table_over_all_arms_in_the_order_they_ran(tmp_path: Path) -> None:
    a_sweep(tmp_path, {"model=deepstack_l": results(0.95), "model=baseline": results(0.25)})
    console = Console(record=True, width=140)
    report(tmp_path, console)
    text = console.export_text()
    assert text.index("model=deepstack_l") < text.index("model=baseline")
    assert "0.950 [0.900, 1.000]" in text
    assert "4 min 32 s" in text
    assert "1,657,824" in text
    assert [arm["name"] for arm in json.loads((tmp_path / "sweep.json").read_text())["arms"]] == [
        "model=deepstack_l",
        "model=baseline",
    ]
    assert "| model=baseline | 0.250 [0.200, 0.300] |" in (tmp_path / "report.md").read_text()


def test_arms_that_differ_only_in_the_plan_are_called_fair(tmp_path: Path) -> None:
    arms = read_arms(a_sweep(tmp_path, {"a": results(0.9), "b": results(0.2)}))
    assert fairness(arms) == [
        "all arms: same samples in the same order",
        "all arms: same validation samples",
        "all arms: same initial weights (llm)",
        "all arms: same initial weights (projector)",
        "all arms: same initial weights (vision)",
        "all arms: same number of steps",
    ]


def test_another_order_or_other_initial_weights_are_called_out(tmp_path: Path) -> None:
    other = results(
        0.2, data={**DATA, "order_digest": "other"}, init_digest={"vision": "v", "projector": "q", "llm": "l"}
    )
    lines = fairness(read_arms(a_sweep(tmp_path, {"a": results(0.9), "b": other})))
    assert "all arms: NOT the same samples in the same order (a order, b other)" in lines
    assert "all arms: NOT the same initial weights (projector) (a p, b q)" in lines


def test_other_validation_samples_are_called_out(tmp_path: Path) -> None:
    other = results(0.2, data={**DATA, "fingerprint": {"train": "t", "val": "w"}})
    lines = fairness(read_arms(a_sweep(tmp_path, {"a": results(0.9), "b": other})))
    assert "all arms: NOT the same validation samples (a v, b w)" in lines


def test_arms_that_did_not_finish_are_not_compared(tmp_path: Path) -> None:
    arms = {"a": results(0.9), "b": results(0.2), "c": results(0.1, status="interrupted", steps=7, metrics={})}
    a_sweep(tmp_path, arms)
    write_failure(tmp_path / "d", [], "the sweep was interrupted before it", "not started")
    lines = fairness(read_arms(tmp_path))
    assert "all arms that finished: same samples in the same order" in lines
    assert "all arms that finished: same number of steps" in lines
    assert "interrupted: c: at step 7" in lines
    assert "not started: d: the sweep was interrupted before it" in lines
    report(tmp_path, Console(record=True, width=140))


def test_a_sweep_of_dry_runs_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "sweeps" / "s" / "multirun.yaml").write_text("")
    report(tmp_path / "sweeps" / "s", Console())
    assert not (tmp_path / "sweeps").exists()


def test_parts_of_another_architecture_are_compared_among_themselves(tmp_path: Path) -> None:
    wide = {"vision": "V", "projector": "P2", "llm": "L"}, {"vision": "v", "projector": "p2", "llm": "l"}
    more = {"architecture_digest": wide[0], "init_digest": wide[1]}
    arms = {"a": results(0.9), "b": results(0.9, **more), "c": results(0.9, **more)}
    lines = fairness(read_arms(a_sweep(tmp_path, arms)))
    assert "b, c: same initial weights (projector)" in lines
    assert not any("NOT" in line for line in lines)


def test_a_sweep_of_which_nothing_finished_says_who_ended_how(tmp_path: Path) -> None:
    write_failure(tmp_path / "a", [], "too deep")
    report(tmp_path, Console(record=True, width=140))
    assert "- failed: a: too deep" in (tmp_path / "report.md").read_text()


def test_a_report_that_cannot_be_written_is_said_and_fails_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra makes a warning of what a callback raises, and goes on."""
    a_sweep(tmp_path, {"a": results(0.9)})
    monkeypatch.setattr(SweepReport, "failed", False)
    monkeypatch.setattr(SweepReport, "arms", [])
    monkeypatch.setattr("deepstack_pl.cli.sweep.report", lambda *_: 1 / 0)
    SweepReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert SweepReport.failed
    assert "Traceback" in capsys.readouterr().err


def test_a_failed_arm_is_listed_and_keeps_what_it_had_found(tmp_path: Path) -> None:
    a_sweep(tmp_path, {"a": results(0.9), "b": results(0.9, status="running", metrics={})})
    write_failure(tmp_path / "b", ["model.start_layer=50"], "too deep")
    write_failure(tmp_path / "c", ["model.start_layer=60"], "deeper still")
    console = Console(record=True, width=140)
    report(tmp_path, console)
    text = console.export_text()
    assert text.count("failed") >= 4
    assert "failed: b: too deep" in text
    assert "failed: c: deeper still" in text


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    console = Console(record=True, width=140)
    leave_checkpoint(tmp_path, 12)
    print_report(console, results(0.5, interrupted=True, steps=12), tmp_path)
    text = console.export_text()
    assert "80 seen, 16 in the context" in text
    assert "Interrupted at step 12. To go on: python train.py ckpt_path=" in text


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 272)] == ["0 s", "59 s", "1 min 01 s", "4 min 32 s"]
