"""Two processes under gloo and Lightning's DDP: the same samples as one, in the same steps, through every resume."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from several_processes import BATCH, PAGES, STEPS, one_fit

SCRIPT = Path(__file__).with_name("several_processes.py")
HERE = [  # what one process leaves for two to go on with
    {"name": "one"},
    {"name": "one-2", "until": 2, "micro": 4},
]
TWO = [
    {"name": "two"},
    {"name": "two-small", "micro": 1, "workers": 1},
    {"name": "two-2", "until": 2, "micro": 2},
    {"name": "two-2-more", "until": 5, "resume": "two-2", "workers": 1},  # again in an epoch
    {"name": "two-2-more-end", "resume": "two-2-more", "micro": 1},
    {"name": "two-3", "until": 3},  # an epoch's end
    {"name": "two-3-end", "resume": "two-3", "micro": 2},
    {"name": "one-2-two", "until": 4, "resume": "one-2"},
    {"name": "grouped", "batching": "modality_length", "shuffle": "blocks"},
    {"name": "dropped", "remainder": "drop"},
]
BACK = [
    {"name": "two-2-one", "resume": "two-2", "workers": 1},
    {"name": "one-2-two-one", "resume": "one-2-two", "micro": 2},
    {"name": "grouped-one", "batching": "modality_length", "shuffle": "blocks", "micro": 4},
]
ALL = ["one-2", "two", "two-small", "two-2-more-end", "two-3-end", "two-2-one", "one-2-two-one"]


def launch(folder: Path, phases: list[dict]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), json.dumps(phases)],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def notes(folder: Path, name: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / name).glob("rank-*.json"))]


def steps(folder: Path, name: str) -> list[list[str]]:
    """The keys of each optimiser step, in the order of the global batch."""
    ranks = [note["keys"] for note in notes(folder, name)]
    assert len({len(rank) for rank in ranks}) == 1, "every process runs as many micro-batches"
    rows = list(chain.from_iterable(chain.from_iterable(zip(*ranks, strict=True))))
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for phase in HERE:
        one_fit(folder, **phase)
    bad = [key for key in steps(folder, "one")[0][BATCH // 2 :]]
    spoilt = {"bad": bad, "max_refused": 0.1}
    launch(folder, [*TWO, {"name": "allowed", "until": 3, "bad": bad, "max_refused": 0.5}, {"name": "over", **spoilt}])
    for phase in BACK:
        one_fit(folder, **phase)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts"),
    [
        ["two"],
        ["two-small"],
        ["two-2", "two-2-more", "two-2-more-end"],
        ["two-3", "two-3-end"],
        ["two-2", "two-2-one"],
        ["one-2", "one-2-two", "one-2-two-one"],
    ],
    ids="-".join,
)
def test_the_same_samples_in_the_same_steps_whoever_reads_them(folder: Path, parts: list[str]) -> None:
    whole = steps(folder, "one")
    assert len(whole) == STEPS
    assert sorted(key for key in chain(*whole[:3]) if key) == sorted(f"page {i}" for i in range(PAGES))
    assert [step for name in parts for step in steps(folder, name)] == whole
    assert notes(folder, parts[-1])[0]["tally"] == notes(folder, "one")[0]["tally"]


@pytest.mark.slow
def test_grouped_by_length_two_processes_see_what_one_sees(folder: Path) -> None:
    assert steps(folder, "grouped") == steps(folder, "grouped-one") != steps(folder, "one")


@pytest.mark.slow
def test_a_dropped_remainder_is_dropped_on_every_process(folder: Path) -> None:
    assert all(len(keys) == BATCH and "" not in keys for keys in steps(folder, "dropped"))


@pytest.mark.slow
def test_bad_samples_of_one_process_leave_the_batches_of_both_as_many(folder: Path) -> None:
    assert steps(folder, "allowed") == steps(folder, "one")[:3]
    tallies = [note["tally"] for note in notes(folder, "allowed")]
    assert tallies[0] == tallies[1]
    assert tallies[0]["refused"] == {"image": BATCH // 2}
    lines = (folder / "allowed" / "ledger-1.jsonl").read_text().splitlines()
    assert len(lines) == BATCH // 2
    assert not (folder / "allowed" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_too_many_bad_samples_on_one_process_stop_both_at_the_same_step(folder: Path) -> None:
    first, second = notes(folder, "over")
    for note in (first, second):
        assert "4 of 18 samples refused, more than data.max_refused=0.1" in note["error"]
        assert note["keys"] == []
    assert "cannot be read" in second["error"]
