"""Loggers and the profiler, as they are said on the command line."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny_run import SMALL, execute, run_of

from deepstack_pl.cli.logs import loggers_of, profiler_of

FEW = (*SMALL, "llm.architecture.num_hidden_layers=5", "~callbacks.progress")


def test_several_loggers_at_once_and_none(tmp_path: Path) -> None:
    several = loggers_of(run_of("logger=[tensorboard,csv]"), tmp_path)
    assert [type(each).__mro__[2] for each in several] == [TensorBoardLogger, CSVLogger]
    assert loggers_of(run_of("~logger"), tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_logger_has_a_key_of_its_own() -> None:
    run = run_of("~logger")
    run.logger = {"_target_": "lightning.pytorch.loggers.CSVLogger"}
    with pytest.raises(ValueError, match=r"logger\._target_=.*: every logger has a key of its own"):
        loggers_of(run, Path("somewhere"))


def test_numbers_reports_and_the_last_evaluation_lie_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("logger=csv", "trainer.profiler=simple", "trainer.log_every_n_steps=1")
    execute(run_of(*FEW, *words), folder, "python train.py")
    with open(folder / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train/loss"]) for row in rows) == 3
    assert any(row["final/fine/accuracy"] for row in rows)
    report = (folder / "fit-profile.txt").read_text()
    assert "FIT Profiler Report" in report
    assert "run_training_batch" in report


@pytest.mark.slow
@pytest.mark.parametrize("profiler", ["advanced", "pytorch"])
def test_the_other_profilers_report_too(profiler: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    execute(run_of(*FEW, "~logger", f"trainer.profiler={profiler}"), folder, "python train.py")
    assert "training_step" in (folder / "fit-profile.txt").read_text()


def test_an_unknown_profiler_is_named() -> None:
    with pytest.raises(ValueError, match=r"trainer\.profiler=fast: use simple, advanced, pytorch"):
        profiler_of("fast", Path("somewhere"))
    assert profiler_of(None, Path("somewhere")) is None
