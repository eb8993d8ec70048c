"""The benchmarks run, and compare what they say they compare. No figure is looked at here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "benchmarks"
ROWS = {
    "loss": 3,
    "injection": 2,
    "context": 3,
    "published_way": 3,
    "scaling": 4 * 2 + 2,
}


def run(script: str, folder: Path, *words: str) -> str:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *words, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / f"{script}.md").read_text() in done.stdout
    return done.stdout


def table_rows(text: str) -> list[list[str]]:
    """Cells of every row below a table's head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    below = [i for i, line in enumerate(lines) if set(line) <= set("|- ")]
    heads = {i - 1 for i in below} | set(below)
    return [[cell.strip() for cell in line.strip("|").split("|")] for i, line in enumerate(lines) if i not in heads]


@pytest.mark.slow
@pytest.mark.parametrize("script", ROWS)
def test_a_benchmark_runs_and_writes_its_table_and_every_time(script: str, tmp_path: Path) -> None:
    said = run(script, tmp_path, "--quick")
    assert len(table_rows(said)) == ROWS[script]
    assert json.loads((tmp_path / f"{script}.json").read_text())
    if script == "published_way":
        assert "Both give one loss" in said
    if script == "context":
        assert (tmp_path / "context_for_resolution.png").stat().st_size > 10_000


@pytest.mark.parametrize("tiles", [0, 2, 4, 9])
def test_an_image_of_the_benchmarks_fills_the_plans_largest_grid(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale curve over tiles would else be flat from four on."""
    monkeypatch.syspath_prepend(FOLDER)
    sizes = import_module("sizes")
    plan = replace(sizes.STACKED, tiles=tiles, groups=tiles) if tiles else sizes.BASELINE
    llm, vision = sizes.llm_of(width=32, layers=12, heads=2, vocabulary=64), sizes.vision_of(patches=3, width=16)
    model = sizes.model_of(plan, llm, vision)
    assert [len(sizes.sample_of(model, 0, text=8, images=n).views) for n in (1, 2)] == [1 + tiles, 2 * (1 + tiles)]


def test_every_batch_grouped_by_length_is_full_and_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest would put short and long together, and grouping would look slower than it is."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmark sets it, for good
    monkeypatch.syspath_prepend(FOLDER)
    bench = import_module("published_way")
    picture = Image.new("RGB", (8, 8))

    def drawn(count: int) -> list[Any]:
        return [bench.Raw(f"{n}", [1] * (n % 7 + 1), [1], None if n % 5 == 4 else picture) for n in range(count)]

    batches = bench.grouped(drawn(bench.SAMPLES))
    assert {len(batch) for batch in batches} == {bench.BATCH}
    assert all(len({sample.image is None for sample in batch}) == 1 for batch in batches)
    with pytest.raises(SystemExit, match="leave a rest in batches of 12"):
        bench.grouped(drawn(2 * bench.BATCH))


_WITHOUT = """
import importlib.util, runpy, sys

GONE, own = set(sys.argv.pop(1).split(",")), importlib.util.find_spec


class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Gone())
importlib.util.find_spec = lambda name, *rest: None if name in GONE else own(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# What pyproject.toml asks for and a machine with torch and transformers may lack.
ABSENT = "open_clip,timm,peft,jaxtyping,lightning,hydra,omegaconf,tensorboard,torchmetrics,simplejpeg,rich,matplotlib"


def gpu_without(libraries: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _WITHOUT, libraries, str(FOLDER / "gpu.py"), "--smoke", "--out", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("library", ["transformers", "einops"])
def test_what_the_gpu_bench_cannot_do_without_is_said_in_one_sentence(library: str, tmp_path: Path) -> None:
    done = gpu_without(library, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"No figures without {library}: install that beside torch, and start again."


def test_the_gpu_bench_installs_nothing() -> None:
    words = ["make", "-n", "--no-print-directory", "bench-gpu"]
    # Another make that runs these tests would have this one speak of folders, and name its environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("python experiments/benchmarks/gpu.py")
    assert "pip" not in said


def test_the_gpu_bench_begins_no_case_that_may_not_end_in_time_and_writes_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    gpu = import_module("gpu")
    assert gpu.may_begin(30.0, [0.0, 20.0, 4.0])
    assert not gpu.may_begin(29.0, [0.0, 20.0, 4.0])
    for count in (1, 2):
        gpu.written(tmp_path, "a card", ["| row |"] * count, [{}] * count)
        assert (tmp_path / "gpu.md").read_text().count("| row |") == count


@pytest.mark.slow
def test_the_gpu_bench_runs_where_towers_and_adapters_are_not_installed(tmp_path: Path) -> None:
    done = gpu_without(ABSENT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = table_rows((tmp_path / "gpu.md").read_text())
    assert len(rows) == 5
    assert all(float(row[6].replace(",", "")) > 0 for row in rows), "every case trained"
    assert "not installed: open_clip, timm, peft, jaxtyping" in done.stdout
    assert "no figures" in done.stdout


def test_what_was_not_measured_says_so() -> None:
    """The committed table names its device, or says that there was none."""
    text = (FOLDER / "gpu.md").read_text()
    assert "Not measured" in text or ("NVIDIA" in text and "--smoke" not in text)


def test_every_committed_table_stands_beside_its_command_and_its_times() -> None:
    for script in ROWS:
        text = (FOLDER / f"{script}.md").read_text()
        assert f"Command: `python experiments/benchmarks/{script}.py --repetitions " in text
        assert "--quick" not in text
        assert (FOLDER / f"{script}.json").is_file()
