"""The command: what it says, refuses, survives, and that what it built is trained on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builds import built, config_of, tars
from replicas import jpeg, picture, write_replica

from deepstack_pl.cli.main import main
from deepstack_pl.data.build import How
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.sources import ShardSource, open_sources
from deepstack_pl.data.verify import shard_folders, verify


def test_open_sources_reads_what_was_built_and_says_how_to_build_it(tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    config = config_of(replica)
    command = f"deepstack shards build data=lcs558k data.root={tmp_path}"
    with pytest.raises(ValueError, match=f"Build them once: {command}$"):
        open_sources(config)
    built(replica, tmp_path / "shards/lcs558k")
    train, val = open_sources(config)
    assert len(train) + len(val) == len(replica.records)
    assert train.columns.sources == ("lcs558k",)
    assert train[0].source == "lcs558k"


def test_the_command_builds_says_totals_and_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = write_replica("llava665k", tmp_path)
    words = ["shards", "build", "data=llava665k", f"data.root={tmp_path}", "processes=1"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "missing=skip" in said.err
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["llava665k.left_out.jsonl"]
    assert main([*words, "missing=skip"]) == 0
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["llava665k"]
    said = capsys.readouterr().out
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:6]]
        for line in said.splitlines()
        if "│" in line
    }
    taken = len(replica.records) - len(replica.refused)
    assert lines["all"][:3] == ["665,298", str(len(replica.records)), str(taken)]
    assert lines["without an image"][0] == "40,688"
    assert lines["coco"][0] == "364,100"
    assert lines["all"][3] == f"{len(replica.records) - 665_298:+,}"
    assert f"Train on them: python train.py data=llava665k data.root={tmp_path}" in said


def test_totals_that_are_as_published_are_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    count = len(replica.records)
    words = ["shards", "build", "data=lcs558k", f"data.root={tmp_path}", "processes=1"]
    assert main([*words, f"data.expected.records={count}", f"data.expected.sources.lcs558k={count}"]) == 0
    assert capsys.readouterr().out.count("as published") == 3 + 3  # records, text, source; what was put right


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing=maybe", "missing=maybe: use error or skip"),
        ("processes=0", "processes=0: use a whole number from 1 on"),
        ("shard_mb=x", "shard_mb=x: use a whole number from 1 on"),
        ("decode=1", "decode=1: use true or false"),
        ("out=s3://bucket/x", "build into a folder of this machine, and upload it"),
        ("data=fine_print", "shards are built of LLaVA-format JSON files"),
        ("data.images=nowhere", "nowhere is no folder"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    words = ["data=lcs558k", f"data.root={tmp_path}", "data.images=.", word]
    words = words[3:] if word.startswith("data=") else words
    assert main(["shards", "build", *words]) == 1
    assert message in capsys.readouterr().err


def test_any_llava_json_is_built_and_trained_on_as_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replica = write_replica("sharegpt4v_sft", tmp_path, clean=True)
    out = tmp_path / "mine"
    words = [f"data.path={replica.json}", f"data.images={replica.images}", f"out={out}", "processes=1"]
    assert main(["shards", "build", "data=llava_json", *words]) == 0
    assert f"Train on them: python train.py data=shards data.root={out}" in capsys.readouterr().out
    train, val = open_sources(DataConfig(source=Kind.shards, root=str(out)))
    assert len(train) + len(val) == len(replica.records)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_interrupted_or_killed_ends_at_once_and_goes_on(tmp_path: Path, sent: signal.Signals) -> None:
    replica = write_replica("llava665k", tmp_path, clean=True)
    heavy = jpeg(picture(1, 1200, 900))
    for row in range(len(replica.records)):
        image = replica.records[row].get("image")
        if image is not None:
            (replica.images / image).write_bytes(heavy)
    records = [{**record, "id": str(i)} for i in range(20) for record in replica.records]
    replica.json.write_text(json.dumps(records))
    out = tmp_path / "out"
    words = [f"data.root={tmp_path}", f"out={out}", "shard_mb=1", "processes=2", "data.val_samples=8"]
    entry = "from deepstack_pl.cli.main import entry; entry()"
    command = [sys.executable, "-c", entry, "shards", "build", "data=llava665k", *words]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not tars(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if sent is signal.SIGINT else -9)
    if sent is signal.SIGINT:
        assert said.strip().endswith("stopped by Ctrl-C")
        assert not list(out.rglob(".shard*"))
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.1)
    assert not _alive(process.pid)
    with pytest.raises(ValueError, match="samples are missing"):
        ShardSource(out / "train")
    done = len(tars(out))
    assert main(["shards", "build", "data=llava665k", *words]) == 0
    report = built(replica, out, How(max_bytes=10**6, val_samples=8))
    assert report.kept == len(tars(out)) > done > 0
    assert report.taken.total() == len(records)
    assert not verify(shard_folders(out)).damage


def _alive(session: int) -> bool:
    """Whether a process of the session is left."""
    found = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True, check=False)
    return any(not state.startswith("Z") for state in found.stdout.split())
