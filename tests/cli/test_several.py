"""``python train.py strategy=... trainer.devices=2``: several processes end where one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import SMALL

from deepstack_pl.training.checkpoints import all_of, verify
from deepstack_pl.training.restore import read_model

REPOSITORY = Path(__file__).parents[2]
OURS = os.pathsep.join(str(REPOSITORY / folder) for folder in ("src", "tests/cli"))
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": OURS}
TINY = (*SMALL, "data.micro_batch_size=1", "llm.architecture.num_hidden_layers=5", "~logger")
TWO = ("strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *TINY, f"hydra.run.dir={folder}", *words]


def call(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=cwd)


def run(folder: Path, *words: str) -> dict[str, Any]:
    done = call(command(folder, *words), folder.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {**results_of(folder), "said": done.stdout}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder)
    return folder


def furthest(one: Path, other: Path) -> float:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_two_processes_that_share_the_weights_end_where_one_ends(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    found, alone = run(folder, *TWO), results_of(one)
    assert found["data"] == alone["data"]
    assert found["metrics"] == alone["metrics"]
    assert found["receipt"]["ok"]
    assert found["init_digest"] == alone["init_digest"]
    assert "logits as before" in found["said"]
    assert furthest(one, folder) < 1e-4, "AdamW makes much of the last bits of a gradient"
    assert (folder / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    assert [p.name for p in (folder / "logs").glob("rank-*.log")] == ["rank-1.log"]


def test_a_preempted_run_exits_143_and_goes_on_alone(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    slow = "+callbacks.slow={_target_: tiny_run.Slow}"
    words = command(folder, *TWO, slow, "callbacks.checkpoint.every_steps=1")
    process = subprocess.Popen(words, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not all_of(folder / "checkpoints"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert results_of(folder)["status"] == "interrupted"
    assert "To go on from step" in said
    checkpoint = all_of(folder / "checkpoints")[0]
    assert checkpoint.step < 3
    assert not verify(checkpoint)
    words = [sys.executable, str(REPOSITORY / "train.py"), f"ckpt_path={folder}"]
    alone = ("strategy.kind=single", "trainer.devices=1")
    done = call([*words, *alone], tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(folder)["data"] == results_of(one)["data"]
    assert furthest(one, folder) < 1e-4


def test_a_point_of_a_sweep_is_a_group_of_its_own_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [sys.executable, str(REPOSITORY / "train.py"), "-m", *TINY, *TWO, f"hydra.sweep.dir={sweep}"]
    done = call([*words, "model.start_layer=0,50,1", "evaluation.final_samples=2"], tmp_path)
    assert done.returncode == 1
    found = {path.parent.name: json.loads(path.read_text())["status"] for path in sweep.rglob("results.json")}
    assert sorted(found.values()) == ["failed", "finished", "finished"]
    assert "start_layer" in (done.stdout + done.stderr)
    assert "all arms that finished: same samples in the same order" in done.stdout


def test_what_a_worker_refuses_is_one_sentence(tmp_path: Path) -> None:
    done = call(command(tmp_path / "run", *TWO, "llm.architecture.vocab_size=500"), tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("vocab_size=500, but the tokenizer's largest id is 511") == 1
    assert not (tmp_path / "run").exists(), "a run that never began leaves nothing"


def test_a_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    fault = "+callbacks.fault={_target_: tiny_run.Killed, rank: 1, step: 2}"
    done = call(command(tmp_path / "run", *TWO, fault, "callbacks.checkpoint.every_steps=1"), tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("process 1 was ended by SIGKILL")
    found = results_of(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("failed", last)
    assert all_of(tmp_path / "run" / "checkpoints")[0].step >= 1


def test_a_second_start_is_refused_and_the_first_ends_as_if_there_had_been_none(tmp_path: Path) -> None:
    folder, go = tmp_path / "runs" / "run", tmp_path / "go"
    wait = f"+callbacks.until={{_target_: tiny_run.Until, file: {go}}}"
    words = command(folder, *TWO, wait, "callbacks.checkpoint.every_steps=1")
    first = subprocess.Popen(words, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not all_of(folder / "checkpoints"):
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        before = {file: file.stat().st_size for file in folder.glob("logs/**/*") if "heartbeat" not in file.name}
        assert any(file.parent.name.startswith("group-") for file in before)
        for start, other in (([f"ckpt_path={folder}"], False), (command(folder, *TWO)[2:], True)):
            second = call([sys.executable, str(REPOSITORY / "train.py"), *start], tmp_path)
            assert second.returncode == 1
            assert second.stderr.count("is being trained in by another process. Wait for its end, or stop it") == 1
            assert ("hydra.run.dir" in second.stderr) is other
            assert "Traceback" not in second.stderr
        after = {file: file.stat().st_size for file in folder.glob("logs/**/*") if "heartbeat" not in file.name}
        assert after == before
    finally:
        go.touch()
        _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert results_of(folder)["status"] == "finished"


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    python, script, *rest = command(folder, *TWO, *words)
    start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    return call([*start, *rest], folder.parent)


def test_under_torchrun_a_dry_run_prints_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("global view and up to 4 tiles") == 1


def test_what_process_0_alone_refuses_under_torchrun_is_one_sentence(tmp_path: Path) -> None:
    """It alone looks whether the folder is taken; the other finds it gone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    done = torchrun(tmp_path / "run")
    assert done.returncode == 1
    ours, _, torchruns = done.stderr.partition("torch/distributed/elastic")
    assert torchruns
    assert ours.count("already holds a run") == 1
    assert "Traceback" not in ours


@pytest.mark.parametrize("spread", [(), TWO])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_a_word_and_an_interrupted_run(
    spread: tuple[str, ...], number: int, status: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words, err = command(folder, *spread), (tmp_path / "err").open("w+")
    process = subprocess.Popen(words, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err)
    until = time.monotonic() + 120
    while not (folder / "results.json").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    err.seek(0)
    said = err.read()
    assert "at once" in said
    assert "Traceback" not in said
    assert results_of(folder)["status"] == "interrupted"


def test_callbacks_beside_the_script_are_found_by_all_and_a_killed_launcher_leaves_nothing_elsewhere(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.py").write_text(
        f"import runpy; runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')"
    )
    (own / "mine.py").write_text("from tiny_run import Slow as Mine")
    folder, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    python, _, *rest = command(folder, *TWO, "+callbacks.own={_target_: mine.Mine}")
    environment = {**ENVIRONMENT, "TMPDIR": str(temporary)}
    process = subprocess.Popen([python, str(own / "train.py"), *rest], env=environment, cwd=tmp_path)
    until = time.monotonic() + 120
    while not (folder / "logs" / "heartbeat-1.json").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(temporary.glob("deepstack*"))
    assert len(list(folder.glob("logs/group-*"))) == 1, "which the next start takes away"


def test_the_gathered_weights_are_those_of_the_last_checkpoint(one: Path) -> None:
    weights, stored = load_file(one / "model.safetensors"), read_model(all_of(one / "checkpoints")[0])
    assert all(torch.equal(weights[name], stored[name]) for name in weights)
