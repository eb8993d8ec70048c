"""How many processes a run wants, and who has started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import run_of

from deepstack_pl.cli.folders import Live
from deepstack_pl.cli.machines import Machines, require_device, require_group, started, wanted
from deepstack_pl.cli.run import execute
from deepstack_pl.files import hold, let_go

ASLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], (1, 1)),
        (["strategy=ddp", "trainer.devices=2"], (2, 1)),
        (["strategy=fsdp", "trainer.devices='4'", "trainer.num_nodes=2"], (4, 2)),
        (["strategy=fsdp", "trainer.devices=1"], (1, 1)),
    ],
)
def test_a_process_for_each_device(words: list[str], found: tuple[int, int]) -> None:
    assert wanted(run_of(*words)) == Machines(*found)


def test_every_gpu_is_taken_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert wanted(run_of("strategy=fsdp", "trainer=gpu")).devices == 4
    assert wanted(run_of("strategy=fsdp", "trainer=gpu", "trainer.devices=auto")).devices == 4
    assert wanted(run_of("trainer=gpu")).devices == 1


def test_more_processes_than_gpus_are_refused_before_any_is_started(tmp_path: Path) -> None:
    run = run_of("strategy=fsdp", "trainer=gpu", "trainer.devices=64", "data.batch_size=64")
    with pytest.raises(ValueError, match=r"trainer\.devices=64, but torch finds \d+ GPUs here.*accelerator=cpu"):
        execute(run, tmp_path / "run", "python train.py")
    assert not (tmp_path / "run").exists()


def test_a_machine_of_several_is_told_how_to_start_them_all(tmp_path: Path) -> None:
    run = run_of("strategy=fsdp", "trainer.devices=2", "trainer.num_nodes=2")
    with pytest.raises(ValueError, match=r"torchrun --nnodes 2 --nproc-per-node 2 .* or by srun"):
        execute(run, tmp_path / "run", "python train.py")


def test_torchruns_processes_are_a_group_and_a_lonely_batch_script_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not started()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # what was asked for; nobody has started it
    assert not started()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started()
    with pytest.raises(ValueError, match=r"2 processes were started, but trainer\.devices=4 .* are 8"):
        require_group(Machines(4, 2))


def test_sruns_tasks_are_a_group_that_torch_can_join(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NAME": "train",
    }
    monkeypatch.setattr(os, "environ", {**{k: v for k, v in os.environ.items() if "RANK" not in k}, **slurm})
    assert started()
    found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    require_group(Machines(2, 2))


@pytest.mark.parametrize(("place", "seen", "slurm"), [(2, 2, False), (1, 1, True), (0, 0, False)])
def test_a_process_of_a_group_without_a_gpu_of_its_number_is_refused(
    place: int, seen: int, slurm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": place + 4, "LOCAL_RANK": place}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    if slurm:  # --gpus-per-task: each sees its own alone
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    run = run_of("strategy=ddp", "trainer=gpu", "trainer.devices=4")
    with pytest.raises(ValueError, match=rf"process {place + 4} is number {place} .* it sees {seen}\.") as refused:
        require_device(run)
    assert ("--gpus-per-node" in str(refused.value)) is slurm
    monkeypatch.setattr(torch.cuda, "device_count", lambda: place + 1)
    require_device(run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    require_device(run_of("strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=4"))


@pytest.mark.parametrize("words", [(), ("dry_run=step",)])
def test_a_refused_start_leaves_the_words_and_logs_of_the_processes_that_run(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    call = tmp_path / "run" / "logs" / "group-of-theirs" / "call.json"
    call.parent.mkdir(parents=True)
    call.touch()
    other = hold(tmp_path / "run")
    run = run_of("strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", *words)
    try:
        with pytest.raises(Live, match="being trained in by another process"):
            execute(run, tmp_path / "run", "python train.py")
    finally:
        let_go(other)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [call]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say that a parent has died")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; from deepstack_pl.cli.launch import _before_it_begins\n"
        f"child = subprocess.Popen([sys.executable, '-c', {ASLEEP!r}], preexec_fn=_before_it_begins)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}/status").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
