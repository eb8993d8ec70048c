"""The memory that dry_run=true predicts for each of several processes, beside what two of them hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_memory import SHORT, built, predicted
from tiny_run import run_of

from deepstack_pl.cli import memory
from deepstack_pl.cli.machines import wanted
from deepstack_pl.cli.run import execute
from deepstack_pl.training.memory import StepMemory, predict
from deepstack_pl.training.memory_shares import gathered, share, units_of
from deepstack_pl.training.sharding import replicas_of

SCRIPT = Path(__file__).with_name("shared_step.py")
CASES = [
    ["strategy=fsdp", "stage=finetune"],
    ["strategy=fsdp", "stage=scratch", "strategy.checkpointing=selective"],
    ["strategy=fsdp", "stage=finetune", "strategy.checkpointing=full", "trainer.precision=bf16-mixed"],
    ["strategy=ddp", "stage=scratch"],
]


def of(*words: str, shares: int = 4) -> StepMemory:
    run = run_of(*SHORT, "trainer.devices=4", *words)
    batch = memory.longest_batch(run)
    return predict(built(run, "meta"), batch, run.trainer["precision"], gpu=False, strategy=run.strategy, shares=shares)


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_predicted_is_what_each_of_two_processes_holds(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(file), json.dumps(CASES)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case in json.loads(file.read_text()):
        real, said = case["real"], case["predicted"]
        assert (said["weights"], said["gradients"]) == (real["weights"], real["gradients"]), case
        assert said["most"] == pytest.approx(real["most"], rel=0.05), case


def test_every_parameter_is_of_one_unit_and_the_last_is_the_rest() -> None:
    model = built(run_of(*SHORT), "meta")
    units = units_of(model)
    assert sum(len(unit) for unit in units) == len(list(model.parameters()))
    head = model.get_output_embeddings().weight
    assert any(parameter is head for parameter in units[-1])
    assert len(units) == len(model.blocks()) + 3  # the tower's rest, the projector, the root


def test_the_root_and_two_blocks_are_gathered() -> None:
    def unit(*sizes: int) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16)) for size in sizes]

    assert gathered([unit(10), unit(30, 1), unit(20), unit(5), unit(100)]) == 2 * (100 + 31 + 20)


def test_a_share_is_of_whole_rows() -> None:
    assert share(torch.empty(10, 3), 4, torch.float32) == 3 * 3 * 4
    assert share(torch.empty(1), 8, torch.bfloat16) == 2
    assert share(torch.empty(()), 8, torch.float32) == 4


@pytest.mark.slow
def test_shares_divide_what_is_held_and_leave_activations() -> None:
    whole, parts = predicted(run_of(*SHORT)), of("strategy=fsdp", "data.micro_batch_size=1", "data.batch_size=4")
    for term in ("weights", "gradients", "optimiser"):
        held, each = (sum(getattr(found, term).values()) for found in (whole, parts))
        assert held / 4 <= each < held / 4 * 1.02
    assert parts.gathered > 0
    assert whole.gathered == 0


@pytest.mark.slow
def test_copies_hold_what_one_process_holds() -> None:
    words = ("data.micro_batch_size=4", "data.batch_size=16")
    assert of("strategy=ddp", *words, shares=1) == predicted(run_of(*SHORT))


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept() -> None:
    words = ("strategy=fsdp", "data.batch_size=16")
    kept, some, least = (
        sum(of(*words, f"strategy.checkpointing={how}").peak.values()) for how in ("none", "selective", "full")
    )
    assert kept > 1.2 * some > 1.44 * least


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("strategy=fsdp", "trainer.devices=8", "strategy.checkpointing=full"),
            "fsdp: 8 processes; weights, gradients and AdamW's states in 8 shares. Activations are computed again "
            "(full).",
        ),
        (
            ("strategy=fsdp_hybrid", "trainer.devices=4", "trainer.num_nodes=2"),
            "fsdp_hybrid: 8 processes on 2 machines; weights, gradients and AdamW's states in 4 shares, 2 times. "
            "Activations are kept.",
        ),
        (("strategy=ddp", "trainer.devices=2"), "ddp: 2 processes, each with the whole model. Activations are kept."),
        ((), "single: 1 process. Activations are kept."),
    ],
)
def test_a_run_says_how_it_is_spread(words: tuple[str, ...], said: str) -> None:
    run = run_of(*words)
    there = wanted(run)
    shares = there.world // replicas_of(run.strategy, there.world, there.nodes)
    assert memory.spread_of(run, there, shares) == said


def test_a_dry_run_needs_none_of_the_devices_and_says_what_each_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("data.batch_size=64", "data.micro_batch_size=4", "data.fine_print.train_pages=8", "strategy=fsdp")
    sizes = ("llm.max_length=96", "llm.architecture.num_hidden_layers=5", "trainer=gpu", "trainer.devices=8")
    epochs = ("trainer.max_steps=null", "data.epochs=24")
    execute(run_of(*words, *sizes, *epochs, "dry_run=true"), tmp_path / "run", "python train.py")
    printed = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "fsdp: 8 processes",
        "A step: 2 micro-batches of 4 in each process, at most 6,144 positions in all.",
        "A run: 3 steps of 64, 24 epochs of 8 samples.",
        "memory of one step on each of 8 GPUs, predicted (bf16-mixed, GiB)",
        "weights gathered",
        "fits in 24 GB",
    ):
        assert sentence in printed
