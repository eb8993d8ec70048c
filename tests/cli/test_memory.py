"""The memory that dry_run=true predicts, beside what a real step on the CPU holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CONF, run_of
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.cli import memory
from deepstack_pl.cli.assemble import model_builder
from deepstack_pl.cli.run import execute
from deepstack_pl.config.run import RunConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.memory import BACKWARD, LOSS, StepMemory, Unpredictable, measure, predict
from deepstack_pl.training.parts import apply_stage, optimizer_groups

SHORT = ("llm.max_length=96", "data.batch_size=4", "data.micro_batch_size=4", "llm.architecture.num_hidden_layers=5")


def some(quick: tuple[str, str], *others: tuple[str, str]) -> list[Any]:
    """The first case in every test run, the others with the slow ones."""
    return [quick, *(pytest.param(*other, marks=pytest.mark.slow) for other in others)]


def built(run: RunConfig, device: str) -> DeepStackForConditionalGeneration:
    model = model_builder(run, image_token_id=0)(device=device)
    apply_stage(model, run.stage)
    return model.train()


def predicted(run: RunConfig, precision: str = "32-true", *, gpu: bool = False) -> StepMemory:
    return predict(built(run, "meta"), memory.longest_batch(run), precision, gpu=gpu)


def real(run: RunConfig) -> tuple[DeepStackForConditionalGeneration, dict[str, Any]]:
    """A model with gradients of the micro-batch before, and a batch of which one row is padded."""
    model = built(run, "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model, padded(memory.longest_batch(run)).training_inputs()


def padded(batch: MultimodalBatch) -> MultimodalBatch:
    mask = batch.attention_mask.clone()
    mask[0, -1] = False
    return replace(batch, attention_mask=mask)


@pytest.mark.parametrize(
    ("stage", "attention"),
    some(("scratch", "sdpa"), ("finetune", "eager"), ("pretrain", "sdpa"), ("lora", "sdpa")),
)
def test_the_worst_moment_is_that_of_a_real_step(stage: str, attention: str) -> None:
    run = run_of(*SHORT, f"stage={stage}", f"llm.attention={attention}")
    held = measure(*real(run), autocast=None)
    assert sum(predicted(run).peak.values()) == pytest.approx(sum(held.values()), rel=0.01)


@pytest.mark.slow
def test_half_precision_copies_are_those_of_a_real_step() -> None:
    run = run_of(*SHORT, "stage=finetune")
    held = measure(*real(run), autocast=torch.bfloat16)
    assert sum(predicted(run, "bf16-mixed").peak.values()) == pytest.approx(sum(held.values()), rel=0.01)


@pytest.mark.parametrize(
    ("stage", "model"),
    some(
        ("finetune", "deepstack_l"),
        ("scratch", "deepstack_v"),
        ("pretrain", "long_context"),
        ("lora_both", "deepstack_l"),
    ),
)
def test_what_the_parts_hold_is_what_autograd_saves(stage: str, model: str) -> None:
    """By torch's own account: every storage once, weights and the batch left out."""
    run = run_of(*SHORT, f"stage={stage}", f"model={model}")
    network, inputs = real(run)
    known = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    known |= {given.untyped_storage()._cdata for given in inputs.values() if isinstance(given, Tensor)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(**inputs, use_cache=False).losses.sum()
    kept = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)
    peak = predicted(run).peak
    assert loss.requires_grad
    assert sum(size for place, size in peak.items() if place != BACKWARD) == pytest.approx(kept, rel=0.25)


@pytest.mark.parametrize("stage", ["lora", pytest.param("scratch", marks=pytest.mark.slow)])
def test_gradients_and_states_are_counted_exactly(stage: str) -> None:
    run = run_of(*SHORT, f"stage={stage}")
    network, inputs = real(run)
    network(**inputs, use_cache=False).losses.sum().backward()
    optimizer = torch.optim.AdamW(optimizer_groups(network, run.stage, 0.0), foreach=True)
    optimizer.step()
    found = predicted(run)
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert sum(found.gradients.values()) == sum(grad.nbytes for grad in grads)
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(found.optimiser.values()) == sum(state.nbytes for state in states)
    assert sum(found.weights.values()) == sum(parameter.nbytes for parameter in network.parameters())


def test_frozen_parts_have_weights_alone() -> None:
    found = predicted(run_of(*SHORT, "stage=pretrain"))
    for part in ("vision", "llm"):
        assert (found.gradients[part], found.optimiser[part]) == (0, 0)
        assert found.weights[part] > 0
    assert found.peak.get("vision", 0) < 2**20


@pytest.mark.slow
def test_on_a_gpu_attention_keeps_no_square_of_the_length_but_eager_and_masks_do() -> None:
    def growth(*overrides: str, rows: int = 1) -> float:
        sizes = [f"data.batch_size={rows}", f"data.micro_batch_size={rows}", "model=baseline"]
        short, long = (
            predicted(run_of(*SHORT, *sizes, *overrides, f"llm.max_length={n}"), "bf16-true", gpu=True).peak["llm"]
            for n in (256, 512)
        )
        return long / short

    assert growth() == pytest.approx(2, rel=0.02)
    assert growth("llm.attention=eager") > 2.7
    assert 2.05 < growth(rows=2) < 2.7


def test_autocast_keeps_half_precision_copies_of_weights_and_true_halves_all() -> None:
    run = run_of(
        *SHORT, "llm.architecture.intermediate_size=4096", "stage=finetune", "model=baseline", "llm.max_length=32"
    )
    full, mixed, half = (predicted(run, precision, gpu=True) for precision in ("32-true", "bf16-mixed", "bf16-true"))
    assert mixed.weights == full.weights
    assert mixed.peak["llm"] > full.weights["llm"] / 2
    assert [2 * size for size in half.optimiser.values()] == list(full.optimiser.values())
    assert half.peak["llm"] < mixed.peak["llm"] - full.weights["llm"] / 3


def test_logits_that_are_made_again_belong_to_the_backward_pass() -> None:
    """Two thousand learned tokens are more logits than are held at once."""
    chunks = (
        "llm.architecture.vocab_size=32000",
        "llm.max_length=1024",
        "data.batch_size=2",
        "data.micro_batch_size=2",
    )
    peak = predicted(run_of("llm.architecture.num_hidden_layers=5", *chunks)).peak
    assert 0 < peak[LOSS] < 2.5 * 4 * 2**24 + 2 * 1024 * 32000
    assert peak[BACKWARD] > 0


def test_where_adamw_steps_counts_only_where_it_is_more() -> None:
    parts = {"llm": 10}
    assert StepMemory(parts, parts, {"llm": 20}, {"llm": 3}, update=10).total == 50
    assert StepMemory(parts, parts, {"llm": 20}, {"llm": 30}, update=10).total == 70


def test_an_unknown_precision_is_not_guessed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(Unpredictable, match=r"not known for trainer\.precision=transformer-engine"):
        predicted(run_of(*SHORT), "transformer-engine")
    execute(run_of(*SHORT, "dry_run=true", "trainer.precision=64-true"), tmp_path / "run", "python train.py")
    assert "memory: not known for trainer.precision=64-true" in capsys.readouterr().out


def test_a_dry_run_says_what_a_step_takes_and_where_it_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    execute(run_of(*SHORT, "dry_run=true", "trainer=gpu"), tmp_path / "run", "python train.py")
    said = " ".join(capsys.readouterr().out.split())
    assert "memory of one step on a GPU, predicted (bf16-mixed, GiB)" in said
    assert "Micro-batches of 4 samples, as long as llm.max_length allows (384 positions), with 20 views" in said
    assert ": fits in 24 GB. dry_run=step measures" in said


def test_a_verdict_names_the_smallest_card_that_it_fits_and_the_next_that_it_does_not() -> None:
    def of(gib: int) -> str:
        return memory.verdict(StepMemory({"llm": gib * 2**30}, {}, {}, {}, 0), gpu=True)

    assert "fits in 24 GB." in of(20)
    assert "fits in 40 GB, not in 24 GB." in of(22)
    assert "fits in 80 GB, not in 40 GB." in of(78)
    assert "does not fit in 80 GB." in of(79)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "card"),
    [
        (("experiment=phi3_lora_24gb",), "24 GB"),
        (("experiment=phi3_lora_24gb", "stage=pretrain", "stage.llm.lora.rank=0", "data=lcs558k"), "24 GB"),
        (("experiment=phi3_full_80gb",), "80 GB"),
        (("experiment=phi3_full_80gb", "stage=pretrain", "data=lcs558k"), "40 GB"),
    ],
)
def test_a_recipe_fits_where_it_says_and_holds_what_it_says(words: tuple[str, ...], card: str) -> None:
    run = run_of(*words)
    found = predicted(run, run.trainer["precision"], gpu=True)
    assert f"fits in {card}" in memory.verdict(found, gpu=True)
    name = words[0].partition("=")[2]
    texts = [Path(CONF / "experiment" / f"{name}.yaml"), CONF.parent / "docs" / "recipes.md"]
    said = f"{found.total / 2**30:.1f} GiB"
    for text in texts[len(words) > 1 :]:
        assert said in text.read_text(), f"{text.name} does not say {said}"
