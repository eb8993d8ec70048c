"""The benchmarks run, and compare what they say they compare. No figure is looked at here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


_WITHOUT = """
import importlib.util, runpy, sys

GONE, own = {"open_clip", "timm", "peft"}, importlib.util.find_spec


class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Gone())
importlib.util.find_spec = lambda name, *rest: None if name in GONE else own(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_gpu_bench_runs_where_towers_and_adapters_are_not_installed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _WITHOUT, str(FOLDER / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = table_rows((tmp_path / "gpu.md").read_text())
    assert len(rows) == 5
    assert all(float(row[6].replace(",", "")) > 0 for row in rows), "every case trained"
    assert "not installed: open_clip, timm, peft" in done.stdout
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
