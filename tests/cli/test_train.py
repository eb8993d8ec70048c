"""``python train.py``, as typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import CONF, SMALL, TINY

from deepstack_pl.cli import run as cli_run
from deepstack_pl.cli.provenance import weight_digests
from deepstack_pl.cli.train import main
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.checkpoints import all_of

ROOT = Path(__file__).parents[2]


def train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def latest(folder: Path) -> Path:
    return folder / (folder / "outputs" / "latest").read_text().strip()


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom deepstack_pl.cli.train import main\n"
        f"try:\n    main(pathlib.Path({str(ROOT / 'conf')!r}), {words!r})\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [m for m in ('torch', 'lightning', 'transformers', 'open_clip') if m in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stderr
    assert ("four_arms" if words == ["--help"] else "start_layer: 1") in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+model.strat_layer=2"], "Unknown key model.strat_layer (in '+model.strat_layer=2'). Did you mean "),
        (["ckpt_path=last"], "ckpt_path=last: no run under outputs/"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder."),
    ],
)
def test_a_user_error_is_one_line_without_a_traceback(words: list[str], says: str, tmp_path: Path) -> None:
    done = train(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_an_unknown_flag_is_a_usage_error(tmp_path: Path) -> None:
    assert train("--nosuchflag", cwd=tmp_path).returncode == 2


def test_a_key_misspelt_in_a_users_own_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "early.yaml").write_text("name: early\nstrat_layer: 0\n")
    done = train("model=early", "--config-dir", "mine", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "conf's model/early: Unknown key model.strat_layer. Did you mean model.start_layer?\n"


def test_a_users_own_plan_without_a_name_is_told_where_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "early.yaml").write_text("start_layer: 0\n")
    done = train("model=early", "--config-dir", "mine", "dry_run=true", cwd=tmp_path)
    assert done.stderr == (
        "model.name is not given: mine/model/early.yaml lacks it. Write `name: early` into that file.\n"
    )


def test_a_users_option_of_a_stock_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "baseline.yaml").write_text("name: baseline\n")
    done = train("model=baseline", "--config-dir", "mine", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 1
    assert "two options of one name" in done.stderr


@pytest.mark.parametrize("sweep", [[], ["-m", "model=baseline,deepstack_l"]])
def test_a_second_ctrl_c_ends_with_its_exit_status(
    sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(CONF, [*sweep, *TINY, "+callbacks.twice={_target_: tiny_run.CtrlCTwice}"]) == 130
    assert json.loads((latest(tmp_path) / "results.json").read_text())["status"] == "interrupted"
    assert bool(list(tmp_path.glob("outputs/sweeps/*/report.md"))) is bool(sweep)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_ctrl_c_anywhere_leaves_the_sweeps_report(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> bool:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_run, "execute", stopped)
    assert main(CONF, ["-m", "model=baseline,deepstack_l,deepstack_v", *TINY]) == 130
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    arms = json.loads((sweep / "sweep.json").read_text())["arms"]
    assert [arm["status"] for arm in arms] == ["interrupted", "not started", "not started"]
    assert "not started: model=deepstack_v" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(CONF, ["-m", "model=baseline,deepstack_l", "model.start_layer=1,50", "dry_run=true"]) == 1
    assert not list((tmp_path / "outputs").iterdir())


def test_dry_run_prints_the_plan_and_the_parts_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "early.yaml").write_text("name: early\nstart_layer: 0\n")
    done = train("dry_run=true", "--config-dir", "mine", "model=early", "data=llava_json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan early" in done.stdout
    assert "llm layer  0 | <- group 0" in done.stdout
    assert "what learns (stage scratch)" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["mine"]


@pytest.mark.slow
def test_a_run_leaves_all_that_explains_it_and_can_be_gone_on_with(tmp_path: Path) -> None:
    done = train(*SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training: 8 samples in 1 shards of " in done.stdout
    folder = latest(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "config.json", "model.safetensors", "receipt.json", "results.json", "checkpoints"}
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["steps"] == 3
    assert results["receipt"] == {"ok": True, "injections": 4}
    assert {"coarse", "fine"} == set(results["metrics"])
    assert "ci95" in results["metrics"]["fine"]
    assert results["tokens_per_image"] == {"seen": 80, "context": 16}
    assert str(tmp_path) not in (folder / "results.json").read_text()
    finished = train("ckpt_path=last", cwd=tmp_path)
    assert finished.returncode == 1
    assert "is finished: 3 of 3 steps" in finished.stderr
    more = train("ckpt_path=last", "trainer.max_steps=5", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert latest(tmp_path) == folder
    after = json.loads((folder / "results.json").read_text())
    assert after["steps"] == 5
    assert len(after["starts"]) == 2
    assert after["init_digest"] == results["init_digest"]


@pytest.mark.slow
def test_a_run_starts_from_anothers_weights(tmp_path: Path) -> None:
    assert train(*SMALL, "stage=pretrain", cwd=tmp_path).returncode == 0
    first = latest(tmp_path)
    done = train(*SMALL, "stage=finetune", f"init_from={first}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn, begun = (json.loads((folder / "results.json").read_text()) for folder in (first, latest(tmp_path)))
    left = weight_digests(DeepStackForConditionalGeneration.from_pretrained(first))["init_digest"]
    assert begun["init_digest"] == left
    assert left["projector"] != drawn["init_digest"]["projector"]  # it had learned
    assert left["llm"] == drawn["init_digest"]["llm"]  # it was frozen


@pytest.mark.slow
def test_debug_learns_its_batch_and_passes_through_every_path(tmp_path: Path) -> None:
    done = train("experiment=debug", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = latest(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished"
    assert json.loads((folder / "receipt.json").read_text())["ok"]
    assert all_of(folder / "checkpoints")
    curves = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    loss = curves.Scalars("train/loss")
    assert loss[-1].value < 0.5 < loss[0].value
    assert any("pages" in tag for tag in curves.Tags()["images"]), curves.Tags()["images"]


@pytest.mark.slow
def test_a_sweep_lists_its_arms_and_the_failed_one_too(tmp_path: Path) -> None:
    done = train("-m", "model.start_layer=0,1,50", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    text = (sweep / "report.md").read_text()
    assert "all arms that finished: same samples in the same order" in text
    assert "all arms that finished: same initial weights (llm)" in text
    assert "- failed: model.start_layer=50: 4 groups from layer 50" in text
    assert not (tmp_path / "multirun").exists()


@pytest.mark.slow
def test_one_step_is_tried_on_the_worst_case(tmp_path: Path) -> None:
    done = train("dry_run=step", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "One step on 4 samples" in done.stdout
    assert not list((tmp_path / "outputs").iterdir())
