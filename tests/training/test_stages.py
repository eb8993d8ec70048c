"""What one step of AdamW moves, parameter by parameter: under every stage, and where no sample has an image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_run import SCRATCH, Pages, small_model, small_processor
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.config import LoRAConfig
from deepstack_pl.multimodal.lora import is_adapter
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import (
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Operator,
    Order,
    Sequence,
    Source,
)
from deepstack_pl.training.config import PartConfig, StageConfig
from deepstack_pl.training.parts import adapters_of, apply_stage, optimizer_groups

CONF = Path(__file__).parents[2] / "conf" / "stage"
RATE, DECAY = 0.1, 0.5
TAP = InjectionConfig(source=Source.tap, group=0, layer=5)
# With all that a list of names may forget: mergers of taps, gates in both hosts, a newline.
PLAN = ModelConfig(
    name="all",
    operator=Operator.gated_add,
    taps=[1],
    sequence=Sequence.global_and_tiles,
    order=Order.raster,
    newline=Newline.rows,
    injections=[TAP, InjectionConfig(host=Host.vit, group=0, layer=1, operator=Operator.gated_add)],
)


def stage_of(name: str) -> StageConfig:
    """An option of conf/stage, at one rate for all that learns; adapters as small as the model."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())

    def part(given: dict) -> PartConfig:
        lora = LoRAConfig(rank=2, alpha=4.0, dropout=0.0) if "lora" in given else LoRAConfig()
        return PartConfig(trained=given["trained"], lr=RATE, lora=lora)

    return StageConfig(name=name, **{each: part(values[each]) for each in ("vision", "projector", "llm")})


def batch_of(plan: ModelConfig, *, images: bool) -> MultimodalBatch:
    processor = small_processor(plan)
    words = Record(key="words", turns=(Turn(Role.user, "Which?"), Turn(Role.assistant, "red")), images=())
    records = [Pages()[0], Pages()[1], words] if images else [words, words]
    return processor.collate([processor.prepare(record) for record in records])


def step(
    model: DeepStackForConditionalGeneration, stage: StageConfig, batch: MultimodalBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every parameter before and after one step."""
    optimizer = torch.optim.AdamW(optimizer_groups(model, stage, DECAY))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    model.train()(**batch.training_inputs(), use_cache=False).losses.mean().backward()
    optimizer.step()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_a_step_moves_what_the_stage_trains_and_not_one_bit_of_anything_else(name: str) -> None:
    stage = stage_of(name)
    model = small_model(PLAN, lora=adapters_of(stage))
    for gate in model.gates.values():
        torch.nn.init.constant_(gate, 0.5)  # closed, they would keep gradients of zero from what they inject
    apply_stage(model, stage)
    unreachable = set(model.unreachable())
    trained: set[str] = set()
    for part, named in parts(model).items():
        config = {"vision": stage.vision, "projector": stage.projector, "llm": stage.llm}[part]
        learns: Callable[[str], bool] = is_adapter if config.lora.rank else lambda each: each not in unreachable
        trained |= {each for each, _ in named if config.trained and learns(each)}
    before, after = step(model, stage, batch_of(PLAN, images=True))
    moved = {each for each in before if not torch.equal(before[each], after[each])}
    first_half = {each for each in trained if "lora_A" in each}  # the other half is zero, and so is their gradient
    assert moved - trained == set()
    assert trained - moved <= first_half
    assert {*before} - trained, "something is frozen under every stage"
    assert {"image_newline", "gates.llm", "gates.vit"} <= moved
    assert any(each.startswith("own_projectors.tap_0") for each in moved)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, operator=Operator.add)], ids=["gated", "added"])
def test_a_step_of_text_alone_decays_the_vision_path_and_moves_it_no_further(plan: ModelConfig) -> None:
    """The declared policy: a gradient of zero, on every process; never none, which would skip decay on some alone."""
    stage = stage_of(SCRATCH.name)
    model = small_model(plan)
    apply_stage(model, stage)
    before, after = step(model, stage, batch_of(plan, images=False))
    seen = 0
    for name, parameter in model.named_parameters():
        if name.startswith("language_model") or not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
        decayed = before[name] * (1 - RATE * DECAY) if parameter.ndim >= 2 else before[name]
        torch.testing.assert_close(after[name], decayed, rtol=1e-6, atol=0, msg=lambda text, n=name: f"{n}: {text}")
        seen += 1
    assert seen > 20
    assert not torch.equal(before["language_model.lm_head.weight"], after["language_model.lm_head.weight"])


def test_a_step_of_text_alone_after_one_with_images_goes_on_with_what_was_learned_of_them() -> None:
    """AdamW's moments are not zero then: they decay and move the vision path, as a gradient of zero says."""
    stage, model = stage_of(SCRATCH.name), small_model(PLAN)
    apply_stage(model, stage)
    optimizer = torch.optim.AdamW(optimizer_groups(model, stage, DECAY))
    names = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("language_model")]
    parameters, moved = dict(model.named_parameters()), 0
    for images in (True, False):
        kept = {
            n: (parameters[n].detach().clone(), {k: v.clone() for k, v in optimizer.state[parameters[n]].items()})
            for n in names
        }
        optimizer.zero_grad()
        model.train()(**batch_of(PLAN, images=images).training_inputs(), use_cache=False).losses.mean().backward()
        optimizer.step()
    for name in names:
        (before, state), after = kept[name], parameters[name]
        assert not after.grad.any(), name
        assert optimizer.state[after]["step"] == 2, name
        (first, second), decay = (0.9, 0.999), DECAY if before.ndim >= 2 else 0.0
        momentum, size = first * state["exp_avg"], second * state["exp_avg_sq"]
        torch.testing.assert_close(optimizer.state[after]["exp_avg"], momentum, rtol=1e-6, atol=1e-12)
        step = RATE * (momentum / (1 - first**2)) / ((size / (1 - second**2)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before * (1 - RATE * decay) - step, rtol=1e-4, atol=1e-6)
        moved += bool(step.abs().max() > 1e-3)
    assert moved > 20
