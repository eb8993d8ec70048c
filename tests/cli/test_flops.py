"""Model FLOPs by formula, beside what torch counts of the operations that ran."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import Pages
from tiny_run import run_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.cli.assemble import make_processor, model_builder, settle
from deepstack_pl.cli.layout import collate_of
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training import flops
from deepstack_pl.training.flops import FlopsCounter, causal_pairs, peak_of
from deepstack_pl.training.parts import apply_stage

SHORT = ("llm.architecture.num_hidden_layers=6", "llm.attention=eager", "llm.max_length=512")


def step_of(*words: str) -> tuple[DeepStackForConditionalGeneration, MultimodalBatch]:
    """A model as its stage trains it, and rows of equal length, so that torch counts no padding either."""
    run = run_of(*SHORT, *words)
    settle(run)
    processor = make_processor(run)
    model = model_builder(run, processor.image_token_id)()
    apply_stage(model, run.stage)
    samples = [processor.prepare(Pages()[number]) for number in (0, 1)]
    samples[1].input_ids = samples[1].input_ids[: len(samples[0].input_ids)]
    assert len(samples[0].input_ids) == len(samples[1].input_ids)
    return model.train(), collate_of(run, processor)(samples)


def counted_by_torch(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch.training_inputs(), use_cache=False).losses.sum().backward()
    return counter.get_total_flops()


STAGES = ("scratch", "pretrain", "finetune", "lora", "lora_both", "finetune_vit")
MODELS = ("deepstack_l", "baseline", "deepstack_v", "qwen3_style")


def quick(stage: str, model: str) -> bool:
    """Every stage with one plan, every plan with one stage."""
    return model == MODELS[0] or stage == STAGES[0]


@pytest.mark.parametrize(
    ("stage", "model"),
    [pytest.param(s, m, marks=[] if quick(s, m) else pytest.mark.slow) for s in STAGES for m in MODELS],
)
def test_the_formula_is_what_torch_counts(stage: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, f"stage={stage}", f"model={model}")


@pytest.mark.parametrize(
    "words",
    [
        ("model=deepstack_lv",),
        ("model=gated",),
        ("model=dimension_concat",),
        ("model=long_context",),
        ("model=deepstack_l_hd", "model.start_layer=0"),
        ("projector=mlp_unshared",),
        ("projector=per_injection",),
        ("llm=gemma3_1b", "llm.size=tiny", "llm.init=random"),
        ("llm=phi3", "llm.size=tiny", "llm.init=random"),
        ("model=one_pass",),
    ],
    ids=" ".join,
)
def test_so_it_is_for_other_plans_projectors_and_hosts(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, *words)


def check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """torch counts the whole square of causal attention, which eager attention computes; and no addition."""
    monkeypatch.setattr(flops, "causal_pairs", lambda length, window=None: length**2)
    model, batch = step_of(*words)
    counter = FlopsCounter(model)
    expected = counted_by_torch(model, batch)
    found = counter.of(replace(batch, filled={name: [0] * len(own) for name, own in batch.filled.items()}))
    # peft multiplies the adapters of open_clip's attention out, once a step, and so reaches its frozen matrices.
    assert found == pytest.approx(expected, rel=0.03 if "stage=lora_both" in words else 0.001)


@pytest.mark.parametrize(
    ("model", "size", "additions"),
    [
        ("deepstack_l", (96, 96), 4 * 16 * 96),
        ("deepstack_l", (96, 192), 2 * 16 * 96),
        ("deepstack_v", (96, 96), 4 * 16 * 64),
        ("baseline", (96, 96), 0),
    ],
)
def test_an_injection_is_one_addition_for_every_number_that_is_added(
    model: str, size: tuple[int, int], additions: int
) -> None:
    """16 tokens a view; a long image has two tiles, which fill two of four groups; text alone has none."""
    run = run_of(*SHORT, f"model={model}")
    processor = make_processor(run)
    counter = FlopsCounter(model_builder(run, processor.image_token_id)())
    turns = Turn(Role.user, "<image>Which?"), Turn(Role.assistant, "red")
    page = processor.prepare(Record(key="page", turns=turns, images=(Image.new("RGB", size),)))
    text = processor.prepare(Record(key="text", turns=(Turn(Role.user, "Which?"), turns[1]), images=()))
    for samples, expected in (([page], additions), ([page, text, page], 2 * additions), ([text], 0)):
        batch = processor.collate(samples)
        none = {name: [0] * len(own) for name, own in batch.filled.items()}
        assert counter.of(batch) - counter.of(replace(batch, filled=none)) == expected


def test_of_experts_as_many_are_counted_as_a_token_is_sent_to() -> None:
    """Two of four: with all of them a token has 2 x (128 x 32 + 32 x 64) x 2 more operations forward in each layer."""
    layer = torch.nn.Module()
    layer.experts = torch.nn.Module()
    layer.experts.gate_up_proj = torch.nn.Parameter(torch.empty(4, 128, 32))
    layer.experts.down_proj = torch.nn.Parameter(torch.empty(4, 32, 64))
    layer.experts.down_proj_bias = torch.nn.Parameter(torch.empty(4, 32))
    layer.shared_expert = torch.nn.Linear(32, 64)
    whole = sum(flops._times(p, flows=False) for p in flops._matrices(layer))
    of_a_token = whole - flops._idle(layer, False, {"num_experts_per_tok": 2})
    assert of_a_token == 2 * 2 * (2 * (128 * 32 + 32 * 64) + 64 * 32), "forward, and the matrices' gradients"
    with pytest.raises(ValueError, match="an LLM of 4 experts whose config has no num_experts_per_tok"):
        flops._idle(layer, False, {})


def test_causal_pairs_are_those_of_a_mask() -> None:
    for length in (1, 2, 7, 30):
        for window in (None, 1, 3, 7, 50):
            at = torch.arange(length)
            back = at[:, None] - at
            mask = (back >= 0) & (back < (window or length))
            assert causal_pairs(length, window) == int(mask.sum())


def test_padding_is_no_work_and_views_that_are_not_run_neither() -> None:
    run = run_of(*SHORT)
    processor = make_processor(run)
    model = model_builder(run, processor.image_token_id)()
    counter = FlopsCounter(model)

    def of(*samples: Any) -> float:
        batch = processor.collate(list(samples))
        model(**batch.training_inputs(), use_cache=False)
        return counter.of(batch)

    page = processor.prepare(Pages()[0])
    talk = Turn(Role.user, "word " * 200), Turn(Role.assistant, "no")
    text = processor.prepare(Record(key="talk", turns=talk, images=()))
    blank = of(text) - of_the_llm(counter, processor.collate([text]))
    assert of(page) + of(text) - blank == pytest.approx(of(page, text), rel=1e-4)
    assert of(page, page) == pytest.approx(2 * of(page))
    counter.detach()
    assert of(page) == of_the_llm(counter, processor.collate([page]))


def of_the_llm(counter: FlopsCounter, batch: MultimodalBatch) -> float:
    """Of a batch that was never run."""
    return counter.of(batch)


def test_generation_is_not_counted() -> None:
    model, batch = step_of()
    counter = FlopsCounter(model)
    alone = counter.of(batch)
    with torch.no_grad():
        model(**batch.training_inputs(), use_cache=False)
    assert counter.of(batch) == alone


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Something Else", None),
    ],
)
def test_a_peak_is_the_dense_one(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda"), half=True) == peak
    assert peak_of(torch.device("cuda"), half=False) is None
    assert peak_of(torch.device("cpu"), half=True) is None
