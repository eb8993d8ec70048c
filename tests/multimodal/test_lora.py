"""Low-rank adapters: what they leave alone, where they stand, what learns, how they are saved and merged."""

import re
from dataclasses import replace

import pytest
import torch
from lightning import Callback
from small_run import FROZEN, STACKED, VISION, Pages, small_model, small_module, small_processor, small_trainer
from torch import nn

from deepstack_pl.data.config import DataConfig
from deepstack_pl.language.host import assert_installed
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.config import LoRAConfig
from deepstack_pl.multimodal.convert import convert_back
from deepstack_pl.multimodal.lora import is_adapter, merge_adapters, without_adapters
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.stacking.config import Host, ModelConfig
from deepstack_pl.training.config import PartConfig, StageConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.guard import FirstStepGuard, digests
from deepstack_pl.training.parts import adapters_of, apply_stage, optimizer_groups

LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.3)
BOTH = {"vision": LORA, "llm": LORA}
ADAPTED = StageConfig(
    name="lora_both",
    vision=PartConfig(lr=1e-3, lora=LORA),
    projector=PartConfig(lr=2e-3),
    llm=PartConfig(lr=3e-3, lora=LORA),
)


def learned(lora=BOTH, plan=STACKED):
    """A model whose adapters add something."""
    model = small_model(plan, lora=lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model


def batch(plan=STACKED):
    processor = small_processor(plan)
    return processor.collate([processor.prepare(Pages()[i]) for i in range(2)]).model_inputs()


@torch.no_grad()
def logits(model, plan=STACKED):
    return model.eval()(**batch(plan)).logits


def test_adapters_repeat_add_nothing_at_first_and_leave_every_other_draw_alone():
    adapted, again, plain = small_model(lora=BOTH), small_model(lora=BOTH), small_model().state_dict()
    state = adapted.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    drawn = {without_adapters(name): value for name, value in state.items() if not is_adapter(name)}
    assert drawn.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in drawn.items())
    frozen = small_model()
    frozen.requires_grad_(False)  # attention of open_clip takes another path where something learns
    assert torch.equal(logits(adapted), logits(frozen))
    one = small_model(lora={"llm": LORA}).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.items() if "lora_A" in name)


def test_adapters_stand_beside_every_linear_layer_that_is_called_before_the_tap_and_nowhere_else():
    adapted = {re.sub(r"\.lora_.*", "", n) for n, _ in small_model(lora=BOTH).named_parameters() if is_adapter(n)}
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    llm = {name for name in adapted if name.startswith("language_model")}
    assert len(llm) == 6 * len(layers)
    assert {name.rpartition(".")[2] for name in llm} == layers
    blocks = "vision_tower.tower.visual.transformer.resblocks"
    tower = {f"{blocks}.{block}.mlp.{layer}" for block in range(VISION.tap) for layer in ("c_fc", "c_proj")}
    assert adapted - llm == tower
    assert VISION.tap < VISION.layers


def test_every_adapter_gets_a_gradient_from_an_image():
    model = learned()
    apply_stage(model, ADAPTED)
    model(**batch()).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for _, p in trained), [n for n, p in trained if p.grad is None]


def test_named_targets_alone_are_adapted():
    named = replace(LORA, targets=["q_proj", "mlp.down_proj"])
    adapted = [name for name, _ in small_model(lora={"llm": named}).named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 * 6
    assert all("q_proj" in name or "down_proj" in name for name in adapted)


@pytest.mark.parametrize(
    ("part", "target", "known"),
    [("llm", "q_prj", "q_proj"), ("llm", "lm_head", "o_proj"), ("vision", "out_proj", "c_fc")],
)
def test_a_target_that_names_no_layer_is_refused_with_those_there_are(part, target, known):
    with pytest.raises(ValueError, match=rf"stage\.{part}\.lora\.targets: '{target}' names no .*There are .*{known}"):
        small_model(lora={part: replace(LORA, targets=[target])})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llm": PartConfig(lora=replace(LORA, rank=-1))}, r"stage\.llm\.lora\.rank=-1: a rank is 1 or more"),
        ({"llm": PartConfig(lora=replace(LORA, alpha=0.0))}, r"stage\.llm\.lora\.alpha=0\.0.*above zero"),
        ({"vision": PartConfig(lora=replace(LORA, dropout=1.0))}, r"stage\.vision\.lora\.dropout=1\.0"),
        ({"llm": PartConfig(trained=False, lora=LORA)}, r"stage\.llm\.lora\.rank=4, but stage\.llm\.trained=false"),
        ({"projector": PartConfig(lora=LORA)}, r"stage\.projector\.lora\.rank=4: adapters stand in vision or llm"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        adapters_of(StageConfig(name="odd", **changes))


def test_only_adapters_and_the_projector_learn_and_are_the_optimisers():
    model = small_model(lora=BOTH)
    table = apply_stage(model, ADAPTED)
    for part, named in parts(model).items():
        assert all(p.requires_grad == (part == "projector" or is_adapter(name)) for name, p in named), part
    groups = optimizer_groups(model, ADAPTED, 0.1)
    held = sorted(id(p) for group in groups for p in group["params"])
    assert held == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {(g["part"], g["lr"]) for g in groups} == {("vision", 1e-3), ("projector", 2e-3), ("llm", 3e-3)}
    assert table.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "llm: adapters, rank 4, alpha 8, dropout 0.3" in table.markdown()
    assert apply_stage(small_model(device="meta", lora=BOTH), ADAPTED) == table


class Weights(Callback):
    """Digests of all parameters before the first step and after the last."""

    def on_train_start(self, trainer, pl_module):
        self.before = digests(pl_module.network.named_parameters())

    def on_train_end(self, trainer, pl_module):
        self.after = digests(pl_module.network.named_parameters())


def test_training_moves_adapters_and_not_one_bit_of_what_they_stand_beside(tmp_path):
    guard, weights = FirstStepGuard(), Weights()
    data = DeepStackDataModule(
        Pages(), Pages(4), small_processor(), DataConfig(name="x", batch_size=4, workers=0), 0, 2
    )
    stage = replace(ADAPTED, vision=FROZEN)
    module = small_module(stage=stage, steps=2, warmup_ratio=0.0)
    small_trainer(tmp_path, 2, callbacks=[guard, weights]).fit(module, datamodule=data)
    assert guard.done
    moved = {name for name in weights.after if weights.after[name] != weights.before[name]}
    assert moved == {name for name, p in module.network.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in moved)
    assert any("lora_B" in name for name in moved)


def test_a_saved_model_explains_its_adapters_and_loads_strictly(tmp_path):
    model = learned()
    model.save_pretrained(tmp_path)
    loaded = DeepStackForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.typed_lora() == BOTH
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"rank": 4', '"rank": 2'))
    with pytest.raises((ValueError, RuntimeError)):
        DeepStackForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "plan",
    [STACKED, ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0)],
    ids=["into the LLM", "into the ViT"],
)
def test_merged_is_unmerged_and_nothing_of_the_adapters_is_left(plan):
    model = learned(plan=plan)
    before = logits(model, plan)
    assert (before - logits(small_model(plan), plan)).abs().max() > 0.1, "the adapters must matter"
    assert merge_adapters(model) == 6 * 7 + VISION.tap * 2
    assert model.state_dict().keys() == small_model(plan).state_dict().keys()
    assert_installed(model.language_model)
    assert (logits(model, plan) - before).abs().max() <= 1e-5 * before.abs().max()


def test_dropout_is_off_where_nothing_learns():
    model = learned()
    assert torch.equal(logits(model), logits(model))
    model.train()
    one, two = (model(**batch()).logits for _ in range(2))
    assert not torch.equal(one, two)


def test_a_run_with_adapters_starts_from_weights_without_and_says_what_was_drawn(tmp_path):
    source = small_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    source.save_pretrained(tmp_path)
    model = small_model(lora=BOTH)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if is_adapter(name)}
    assert load_weights(model, tmp_path) == ["vision's adapters", "llm's adapters"]
    state = source.state_dict()
    assert all(torch.equal(v, state[without_adapters(n)]) for n, v in model.state_dict().items() if not is_adapter(n))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in adapters.items())


def test_a_run_with_the_same_adapters_goes_on_with_them_and_another_is_refused(tmp_path):
    source = learned()
    source.save_pretrained(tmp_path)
    model = small_model(lora=BOTH)
    assert load_weights(model, tmp_path) == []
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(_state(model), _state(source), strict=True))
    for other in ({}, {"llm": LORA}, {**BOTH, "llm": replace(LORA, rank=2)}):
        with pytest.raises(ValueError, match=r"holds adapters .*rank 4.*deepstack export .* --merge-lora"):
            load_weights(small_model(lora=other), tmp_path)


def _state(model):
    return sorted(model.state_dict().items())


def test_the_published_format_has_no_words_for_adapters(tmp_path):
    small_model(lora=BOTH).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds adapters.*deepstack export .*--merge-lora"):
        convert_back(str(tmp_path / "run"), tmp_path / "published")
