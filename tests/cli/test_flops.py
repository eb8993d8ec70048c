"""Model FLOPs by formula, beside what torch counts of the operations that ran."""

from typing import Any

import pytest
import torch
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
    found = counter.of(batch) - batch.group_rows.numel() * model.config.text_config.hidden_size
    # peft multiplies the adapters of open_clip's attention out, once a step, and so reaches its frozen matrices.
    assert found == pytest.approx(expected, rel=0.03 if "stage=lora_both" in words else 0.001)


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
