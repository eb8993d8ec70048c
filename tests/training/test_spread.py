"""Spread over two processes a run learns what it learns in one: loss, gradients, weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spread_fits import one_fit

SCRIPT = Path(__file__).with_name("spread_fits.py")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODES = ("none", "selective", "full")
EXACT = [{"kind": kind, "checkpointing": mode} for kind in ("ddp", "fsdp") for mode in MODES]
EXACT += [{"kind": "fsdp_hybrid", "replicas": 2}, {"kind": "fsdp", "tied": True}, {"kind": "fsdp", "micro": 4}]
EXACT += [{"kind": kind, "stage": stage} for kind in ("ddp", "fsdp") for stage in ("pretrain", "finetune", "lora")]
PLANS = ("deepstack_v", "deepstack_lv", "qwen3_style", "gated", "deepstack_l_hd")
EXACT += [{"kind": "fsdp", "checkpointing": "full", "plan": plan} for plan in PLANS]
EXACT += [{"kind": "ddp", "plan": "deepstack_lv"}, {"kind": "fsdp", "plan": "deepstack_v", "stage": "lora"}]
EXACT += [{"kind": "fsdp", "attention": "varlen", "micro": 2, "checkpointing": mode} for mode in ("none", "full")]
EXACT += [{"kind": kind, "compiled": True} for kind in ("ddp", "fsdp")]
BFLOAT = [{"kind": "fsdp", "precision": "bf16-mixed", "checkpointing": mode} for mode in MODES]


def name_of(how: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in how.items())


def key_of(how: dict[str, Any]) -> tuple[str, bool, str]:
    """What is learned, however it is spread."""
    return how.get("stage", "scratch"), how.get("tied", False), how.get("plan", "deepstack_l")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fit in two processes, one group for all."""
    return in_two(tmp_path_factory.mktemp("together"), [*EXACT, *BFLOAT], timeout=280)


def in_two(folder: Path, fits: list[dict[str, Any]], timeout: int) -> Path:
    """The same folder, with what two processes learned by each of ``fits``."""
    phases = [{"name": name_of(how), **how} for how in fits]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(folder), json.dumps(phases)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in one process, by stage, tied head and plan."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for key in sorted({key_of(how) for how in EXACT}):
        stage, tied, plan = key
        one_fit(folder, "one", stage=stage, tied=tied, plan=plan)
        found[key] = torch.load(folder / "one.pt", weights_only=True)
    return found


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.mark.parametrize("how", EXACT, ids=name_of)
def test_two_processes_learn_what_one_learns(how: dict[str, Any], together: Path, alone: dict[str, Any]) -> None:
    one = alone[key_of(how)]
    two = torch.load(together / f"{name_of(how)}.pt", weights_only=True)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][-1] != pytest.approx(one["losses"][0], abs=1e-3), "nothing was learned: nothing is shown"
    assert differ(one["gradients"], two["gradients"]) < 1e-5
    if key_of(how) == key_of({}):
        norm = sum(float(gradient.square().sum()) for gradient in two["gradients"].values()) ** 0.5
        assert norm == pytest.approx(1.0, abs=1e-4), "clipped by the norm of all shares"
    assert differ(one["weights"], two["weights"]) < 1e-5
    assert one["flops"] == two["flops"], "work is counted by whole matrices"


def test_a_process_without_an_image_keeps_nobody_waiting_and_changes_nothing(tmp_path: Path) -> None:
    """Elsewhere it hangs: processes run different modules, and wait for gradients that nobody sends."""
    fits = [{"kind": kind, "plan": plan} for kind, plan in (("ddp", "deepstack_lv"), ("fsdp", "qwen3_style"))]
    in_two(tmp_path, fits, timeout=150)
    for how in fits:
        one_fit(tmp_path, "one", plan=how["plan"])
        one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", name_of(how)))
        assert [True, False] in two["images"], "nothing is shown"
        assert [False, True] in two["images"], "nothing is shown"
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert differ(one["weights"], two["weights"]) < 1e-5


@pytest.mark.parametrize("how", BFLOAT, ids=name_of)
def test_bfloat16_under_shares_stays_near_float32(how: dict[str, Any], together: Path, alone: dict[str, Any]) -> None:
    one, two = alone[key_of({})], torch.load(together / f"{name_of(how)}.pt", weights_only=True)
    assert two["losses"] == pytest.approx(one["losses"], abs=0.05)
    assert 0 < differ(one["weights"], two["weights"]) < 0.05
    plain = torch.load(together / f"{name_of(BFLOAT[0])}.pt", weights_only=True)
    assert differ(plain["weights"], two["weights"]) < 1e-5, "what is computed again is what was computed"
