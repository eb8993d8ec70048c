"""A sweep that is gone on with: what each point has come to, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import DictConfig
from tiny_run import CONF, TINY, leave_checkpoint, run_of

from deepstack_pl.cli import points
from deepstack_pl.cli.folders import Live
from deepstack_pl.cli.points import differences, remember_words, standing, words_of
from deepstack_pl.cli.train import Jobs
from deepstack_pl.config.load import register, save
from deepstack_pl.config.schema import Schema
from deepstack_pl.files import hold, is_held, let_go

REPOSITORY = Path(__file__).parents[2]


def left(folder: Path, status: str, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    save(run_of(*TINY, *overrides), folder / "config.yaml")
    (folder / "results.json").write_text(json.dumps({"status": status, "steps": 2}))
    return folder


def test_a_point_without_a_folder_is_new(tmp_path: Path) -> None:
    found = standing(run_of(*TINY), tmp_path / "point")
    assert (found.finished, found.resumed, found.aside) == (False, None, None)


def test_a_finished_point_is_left_as_it_is(tmp_path: Path) -> None:
    assert standing(run_of(*TINY), left(tmp_path / "point", "finished")).finished


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_one_that_left_a_checkpoint_is_gone_on_with(status: str, tmp_path: Path) -> None:
    folder = left(tmp_path / "point", status)
    leave_checkpoint(folder, 2)
    resumed = standing(run_of(*TINY), folder).resumed
    assert resumed is not None
    assert resumed.checkpoint.name == "step-00000002"
    assert resumed.results["status"] == status


def test_one_that_left_none_is_begun_anew_and_put_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        found = standing(run_of(*TINY), left(tmp_path / "point", "failed"))
        assert found.aside == tmp_path / f".point.before-{number}"
        assert found.aside is not None
        assert (found.aside / "config.yaml").is_file()
    assert not (tmp_path / "point").exists()


def test_one_that_another_sweep_is_at_is_neither_put_aside_nor_called_failed(tmp_path: Path) -> None:
    folder = left(tmp_path / "point", "running")
    other = hold(folder)
    try:
        with pytest.raises(Live, match="is being trained in by another process"):
            standing(run_of(*TINY), folder)
        Jobs(Schema((CONF,)), "python train.py")._leave_out(folder, ["a=1"], "refused", "failed", False)
    finally:
        let_go(other)
    assert json.loads((folder / "results.json").read_text())["status"] == "running"


def test_nobody_can_begin_in_a_point_while_it_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    def look(folder: Path) -> Path:
        held.append(is_held(folder))
        return put_aside(folder)

    put_aside = points._put_aside
    monkeypatch.setattr(points, "_put_aside", look)
    assert standing(run_of(*TINY), left(tmp_path / "point", "failed")).aside is not None
    assert held == [True]
    assert not (tmp_path / "point").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.start_layer=0", "model.start_layer was 1, and is 0"),
        ("trainer.max_steps=4", "trainer.max_steps was 3, and is 4"),
        ("evaluation.final_samples=2", "evaluation.final_samples was 4, and is 2"),
        ("seed=1", "seed was 0, and is 1"),
    ],
)
def test_a_run_of_other_values_is_refused_by_name(override: str, named: str, tmp_path: Path) -> None:
    folder = left(tmp_path / "point", "finished")
    with pytest.raises(ValueError, match=named):
        standing(run_of(*TINY, override), folder)


@pytest.mark.parametrize(
    "override", ["data.workers=3", "data.root=elsewhere", "trainer.log_every_n_steps=1", "logger=csv"]
)
def test_machines_may_change(override: str, tmp_path: Path) -> None:
    words = [word for word in TINY if not (override == "logger=csv" and word == "~logger")]
    assert standing(run_of(*words, override), left(tmp_path / "point", "finished")).finished


def test_epochs_that_were_settled_in_steps_are_the_same_run(tmp_path: Path) -> None:
    epochs = run_of(*TINY, "trainer.max_steps=null", "data.epochs=1")
    folder = left(tmp_path / "point", "interrupted", "trainer.max_steps=2")
    leave_checkpoint(folder, 1)
    assert standing(epochs, folder).resumed is not None
    assert (epochs.trainer["max_steps"], epochs.data.epochs) == (2, None)


def test_every_value_that_is_no_machines_counts() -> None:
    run = run_of(*TINY)
    assert list(differences(run, run)) == []
    run.optim.weight_decay = 0.5
    assert list(differences(run, run_of(*TINY))) == ["optim.weight_decay was 0.0, and is 0.5"]


def test_a_sweep_keeps_its_first_words(tmp_path: Path) -> None:
    remember_words(tmp_path, ["-m", "seed=0,1"])
    remember_words(tmp_path, ["-m", "seed=0"])
    assert words_of(tmp_path) == ["-m", "seed=0,1"]
    assert words_of(tmp_path / "none") is None


def composed(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> DictConfig:
    """A point as Hydra hands it over, in ``folder``."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides))
    state = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(folder), choices={}),
        mode=RunMode.MULTIRUN,
        overrides=SimpleNamespace(task=list(overrides)),
    )
    monkeypatch.setattr("deepstack_pl.cli.train.HydraConfig", SimpleNamespace(get=lambda: state))
    return config


def test_an_interrupted_sweep_says_nothing_of_points_that_were_begun_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp_path / "point", "finished")
    jobs = Jobs(Schema((CONF,)), "python train.py -m", interrupted=True)
    jobs(composed(folder, monkeypatch, *TINY))
    assert json.loads((folder / "results.json").read_text())["status"] == "finished"
    jobs(composed(tmp_path / "new", monkeypatch, *TINY))
    assert json.loads((tmp_path / "new" / "results.json").read_text())["status"] == "not started"


def test_a_run_of_other_values_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left(tmp_path / "point", "finished")
    jobs = Jobs(Schema((CONF,)), "python train.py -m")
    jobs(composed(folder, monkeypatch, *TINY, "model.start_layer=0"))
    assert jobs.failed
    assert "holds a run of other values" in capsys.readouterr().err
    assert json.loads((folder / "results.json").read_text())["status"] == "finished"


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *words], cwd=folder, text=True, capture_output=True, timeout=280
    )


@pytest.mark.slow
def test_a_sweep_goes_on_by_its_folder_finished_points_untouched(tmp_path: Path) -> None:
    """One point fails, one is taken away: going on makes those two, and leaves the third one's files alone."""
    first = train(tmp_path, "-m", *TINY, "model.start_layer=0,1,9", "hydra.sweep.dir=outputs/sweeps/s")
    assert first.returncode == 1
    sweep = tmp_path / "outputs/sweeps/s"
    assert "To go on, finished points left as they are: python train.py ckpt_path=outputs/sweeps/s" in first.stdout
    assert "<svg" in (sweep / "report.html").read_text()
    shutil.rmtree(sweep / "model.start_layer=1")
    kept = (sweep / "model.start_layer=0" / "results.json").stat().st_mtime_ns
    again = train(tmp_path, "ckpt_path=outputs/sweeps/s", "data.workers=0")
    assert again.returncode == 1, again.stderr
    assert "model.start_layer=0: finished already" in again.stdout
    assert (sweep / "model.start_layer=0" / "results.json").stat().st_mtime_ns == kept
    assert json.loads((sweep / "model.start_layer=1" / "results.json").read_text())["status"] == "finished"
    refused = train(tmp_path, "ckpt_path=outputs/sweeps/s", "model.groups=1")
    assert refused.returncode == 1
    assert "a sweep goes on as it was begun" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)])
def test_points_in_processes_of_their_own_are_one_sweep(launcher: tuple[str, ...], tmp_path: Path) -> None:
    name, *more = launcher
    words = [
        "-m",
        *TINY,
        "model.start_layer=0,1,9",
        "hydra.sweep.dir=outputs/sweeps/s",
        f"hydra/launcher={name}",
        *more,
    ]
    found = train(tmp_path, *words)
    assert found.returncode == 1, found.stderr[-2000:]
    status = {
        arm["name"]: arm["status"] for arm in json.loads((tmp_path / "outputs/sweeps/s/sweep.json").read_text())["arms"]
    }
    assert status == {
        "model.start_layer=0": "finished",
        "model.start_layer=1": "finished",
        "model.start_layer=9": "failed",
    }
    assert "fine, model.start_layer=1:" in found.stdout
