"""From a published corpus's layout to a trained model, as a user types it: built, trained on, killed, gone on with."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepstack_pl.cli.main import main
from deepstack_pl.data.shards import read_manifest
from deepstack_pl.training.checkpoints import all_of
from deepstack_pl.training.restore import read_plain

REPOSITORY = Path(__file__).parents[2]
STEPS = 14  # two epochs of seven batches, the last of each filled up
TYPED = [
    "data=llava665k",
    "data.val_samples=6",
    "llm.max_length=512",
    "data.batch_size=8",
    "data.micro_batch_size=4",
    "data.workers=1",
    "data.max_refused=0.1",
    f"trainer.max_steps={STEPS}",
    "evaluation=final",
    "evaluation.final_samples=2",
    "evaluation.max_new_tokens=400",
    "callbacks.checkpoint.every_steps=2",
]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *words]


def run(folder: Path, *words: str) -> dict:
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=250, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def refused(*words: str) -> str:
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=250, env=ENVIRONMENT)
    assert done.returncode == 1
    return done.stderr


def kill_after_a_checkpoint(folder: Path, *words: str) -> None:
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*words), env=ENVIRONMENT, start_new_session=True, **nowhere)
    until = time.monotonic() + 240
    while not all_of(folder / "checkpoints"):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    script = REPOSITORY / "tests" / "data" / "replicas.py"
    subprocess.run([sys.executable, str(script), "llava665k", str(root)], check=True, timeout=120)
    words = ["data=llava665k", f"data.root={root}", "data.val_samples=6", "processes=1"]
    assert main(["shards", "build", *words]) == 1, "some of its records cannot be taken"
    assert not (root / "shards" / "llava665k" / "manifest.json").exists()
    assert main(["shards", "build", *words, "missing=skip"]) == 0
    assert main(["shards", "verify", *words[:2]]) == 0
    return root


@pytest.mark.slow
def test_a_run_on_a_built_corpus_that_is_killed_goes_on_as_if_it_had_not_been(replica: Path, tmp_path: Path) -> None:
    words = [*TYPED, f"data.root={replica}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    results = run(whole, *words, f"hydra.run.dir={whole}")
    shards = read_manifest(replica / "shards" / "llava665k" / "train")
    assert shards is not None
    trained, count = results["data"]["trained"], sum(shard.samples for shard in shards)
    assert trained["samples"] + sum(trained["refused"].values()) == 2 * count, "two epochs, every sample twice"
    assert {"coco", "gqa", "ocr_vqa", "text", "textvqa", "vg"} <= set(trained["sources"])
    kill_after_a_checkpoint(killed, *words, f"hydra.run.dir={killed}")
    # The step that was being written when it was killed is written again: no line twice, none missing.
    again = run(killed, f"ckpt_path={killed}", "data.micro_batch_size=8", "data.workers=0")
    assert again["data"] == results["data"]
    assert (killed / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()
    weights = [read_plain(all_of(folder / "checkpoints")[0]) for folder in (whole, killed)]
    assert weights[0]["DeepStackDataModule"] == weights[1]["DeepStackDataModule"]


@pytest.mark.slow
def test_a_shard_that_is_changed_between_two_starts_is_refused_by_name(replica: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, *TYPED, f"data.root={replica}", "trainer.max_steps=2", f"hydra.run.dir={folder}")
    shards = replica / "shards" / "llava665k" / "train"
    tar, index, manifest = shards / "shard-000000.tar", shards / "shard-000000.index.npz", shards / "manifest.json"
    top = replica / "shards" / "llava665k" / "manifest.json"
    before = tar.read_bytes(), index.read_bytes(), manifest.read_bytes(), top.read_bytes()
    try:
        tar.write_bytes(before[0].replace(b"What", b"That", 1))
        again = (f"ckpt_path={folder}", "trainer.max_steps=4")
        assert "shard-000000.tar has sha256" in refused(*again)
        index.unlink()
        was, now = (hashlib.sha256(data).hexdigest() for data in (before[0], tar.read_bytes()))
        for file in (manifest, top):  # changed on purpose: the set is good again, but not that of the checkpoint
            file.write_text(file.read_text().replace(was, now))
        assert "train/shard-000000.tar (has other bytes)" in refused(*again)
    finally:
        for file, data in zip((tar, index, manifest, top), before, strict=True):
            file.write_bytes(data)
