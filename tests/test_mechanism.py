"""The mechanism, in about a minute: what this project exists for, on a page of four swatches and six layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = (
    "vision.image_size=16",
    "llm.architecture.num_hidden_layers=6",
    "llm.architecture.hidden_size=64",
    "llm.architecture.intermediate_size=128",
    "data.fine_print.view_size=16",
    "data.fine_print.cells=2",
    "data.fine_print.val_pages=128",
    "data.workers=1",
    "data.fine_print.train_pages=2048",
    "trainer.max_steps=200",
    "evaluation=final",
    "evaluation.final_samples=256",
    "evaluation.max_new_tokens=8",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute and a half on two free cores
def test_deepstack_l_reads_fine_facts_30_points_better_than_the_baseline_at_the_same_context(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "model=baseline,deepstack_l", *SMALL]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # on a busy machine several threads wait for one another
    done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = json.loads(next((tmp_path / "outputs" / "sweeps").glob("*/sweep.json")).read_text())
    arms = {arm["plan"]["name"]: arm for arm in sweep["arms"]}
    baseline, stacked = arms["baseline"], arms["deepstack_l"]
    assert baseline["tokens_per_image"]["context"] == stacked["tokens_per_image"]["context"] == 4
    assert baseline["data"]["order_digest"] == stacked["data"]["order_digest"]
    assert baseline["init_digest"] == stacked["init_digest"]
    fine = {name: arm["metrics"]["fine"] for name, arm in arms.items()}
    assert fine["deepstack_l"]["accuracy"] - fine["baseline"]["accuracy"] >= 0.30
    assert fine["deepstack_l"]["ci95"][0] > fine["baseline"]["ci95"][1]
    # The control: what the global view shows, both read.
    assert min(arm["metrics"]["coarse"]["accuracy"] for arm in arms.values()) > 0.9
