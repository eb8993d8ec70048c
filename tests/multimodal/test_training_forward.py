"""What training reads of the model: a loss for each learned token, in rows of one sample or of several.

The oracle is each sample by itself, through the model's own logits.
"""

import gc
import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llms import twin
from test_hosts import FAMILIES, LAYERS, host
from tiny import IMAGE_TOKEN, MIXED, PLANS, picture, samples, tiny_llm, tiny_model, tiny_vision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.language import loss, varlen
from deepstack_pl.language.config import Attention, Loss
from deepstack_pl.language.loss import logits_of, losses_after
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import ModelConfig, Operator

HERE = [Attention.eager, Attention.sdpa, Attention.varlen]  # flash attention needs a GPU
GATED = ModelConfig(name="gated", start_layer=1, operator=Operator.gated_add)
LAYOUTS: dict[str, Callable[[list[Sample]], list[Any]]] = {
    "rows of one": lambda each: list(each),
    "two rows of two": lambda each: [each[:2], each[2:]],
    "one row": lambda each: [each],
    "unequal rows": lambda each: [each[:1], each[1:]],
}


def together(
    model: DeepStackForConditionalGeneration, rows: list[Any], side: PadSide = PadSide.right
) -> MultimodalBatch:
    return collate(rows, pad_id=0, side=side, tokens_per_view=model.config.typed_vision().patches_per_side ** 2)


def learning_the_end(each: list[Sample]) -> list[Sample]:
    """Every other token from the middle on is learned, so that learned ones are no block."""
    for sample in each:
        sample.labels = sample.input_ids.masked_fill(sample.input_ids == IMAGE_TOKEN, IGNORE_INDEX)
        sample.labels[: len(sample.labels) // 3 : 2] = IGNORE_INDEX
    return each


def alone(model: DeepStackForConditionalGeneration, each: list[Sample]) -> dict[str, Tensor]:
    """Each sample's losses by itself, from all its logits."""
    found = {}
    for sample in each:
        batch = together(model, [sample])
        logits, labels = model(**batch.model_inputs(), use_cache=False).logits[0], sample.labels
        learned = labels[1:] != IGNORE_INDEX
        found[sample.key] = F.cross_entropy(logits[:-1][learned], labels[1:][learned], reduction="none")
    return found


def by_sample(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> dict[str, Tensor]:
    losses = model(**batch.training_inputs(), use_cache=False).losses
    owners = batch.sample_ids().flatten()[batch.learned_at]
    return {key: losses[owners == place] for place, key in enumerate(batch.keys)}


def gradients(model: DeepStackForConditionalGeneration, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", HERE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("phi3", "gemma3_1b") else pytest.mark.slow) for n in FAMILIES]
)
def test_losses_of_samples_side_by_side_are_those_of_each_alone(name: str, attention: Attention, layout: str) -> None:
    model, plain = host(name, attention=attention), host(name)
    each = learning_the_end(samples(model))
    with torch.no_grad():
        same(by_sample(model, together(model, LAYOUTS[layout](each))), alone(plain, each))


@pytest.mark.parametrize("plan", [*PLANS.values(), GATED], ids=lambda plan: plan.name)
@pytest.mark.parametrize("attention", HERE, ids=lambda kernel: kernel.name)
def test_gradients_of_samples_side_by_side_are_those_of_each_alone(plan: ModelConfig, attention: Attention) -> None:
    model = build(plan, attention)
    each = learning_the_end(samples(model))
    expected = gradients(model, torch.cat([*alone(model, each).values()]).sum())
    for rows in (LAYOUTS["one row"](each), LAYOUTS["unequal rows"](each)):
        losses = model(**together(model, rows).training_inputs(), use_cache=False).losses
        same(gradients(model, losses.sum()), expected)


def build(
    plan: ModelConfig = PLANS["deepstack_l"], attention: Attention = Attention.sdpa, kind: Loss = Loss.chunked
) -> Any:
    llm, projector = replace(tiny_llm(), attention=attention, loss=kind), ProjectorConfig(name="mlp")
    model = build_model(plan, llm, tiny_vision(), projector, seed=0, image_token_id=IMAGE_TOKEN).eval()
    for gate in model.gates.values():
        torch.nn.init.constant_(gate, 0.5)
    return model


@pytest.mark.slow  # it compiles
def test_flex_attention_keeps_the_samples_of_a_row_apart() -> None:
    model, plain = build(attention=Attention.flex_attention), build()
    each = learning_the_end(samples(model))
    with torch.no_grad():
        same(by_sample(model, together(model, [each])), alone(plain, each))


@pytest.mark.parametrize("attention", HERE, ids=lambda kernel: kernel.name)
def test_what_one_sample_of_a_row_says_changes_no_loss_of_another(attention: Attention) -> None:
    model = build(attention=attention)
    each = learning_the_end(samples(model))
    before = by_sample(model, together(model, [each]))
    changed = learning_the_end(samples(model, [([1, 50, 51, 52, 53, 54, 2], []), *MIXED[1:]]))
    changed[1].views = 255 - changed[1].views
    after = by_sample(model, together(model, [changed]))
    differ = [key for key in before if not torch.equal(before[key], after[key])]
    assert differ == ["row 0", "row 1"]


@pytest.mark.parametrize("attention", HERE, ids=lambda kernel: kernel.name)
def test_a_cache_is_refused_where_segments_would_see_each_other(attention: Attention) -> None:
    model = build(attention=attention)
    batch = together(model, [samples(model)])
    for use_cache in (True, None):
        with pytest.raises(ValueError, match="segments of a row see each other"):
            model(**batch.training_inputs(), use_cache=use_cache)


def test_logits_are_not_asked_of_rows_that_hold_several_samples() -> None:
    model = build()
    with pytest.raises(AssertionError, match="would see each other"):
        together(model, [samples(model)]).model_inputs()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_the_decoders_output_are_the_models_own(name: str) -> None:
    model = host(name)
    batch = together(model, samples(model))
    hidden: list[Tensor] = []
    decoder = model.language_model.get_decoder()
    decoder.register_forward_hook(lambda *args: hidden.append(args[2].last_hidden_state))
    with torch.no_grad():
        logits = model(**batch.model_inputs(), use_cache=False).logits
        again = logits_of(model.language_model, hidden[0].flatten(0, 1))
    assert torch.equal(again, logits.flatten(0, 1))


def test_the_decoders_output_is_let_go_as_soon_as_its_logits_are_there() -> None:
    """A reference cycle kept every chunk of it until Python looked for cycles: memory that nothing predicted."""
    model = tiny_model(PLANS["deepstack_l"])
    hidden = torch.randn(3, model.language_model.config.hidden_size)
    its = weakref.ref(hidden)
    gc.disable()
    try:
        logits_of(model.language_model, hidden)
        del hidden
        assert its() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["granite", "hyperclovax"])
def test_a_head_that_scales_its_logits_is_learned_through_as_it_is(name: str) -> None:
    llm = twin("granite", LAYERS)
    if name == "hyperclovax":  # it multiplies by the value of this name, Granite divides
        llm = replace(llm, family=name)
    each: dict[Loss, Any] = {}
    for kind in Loss:
        each[kind] = build_model(
            PLANS["deepstack_l"],
            replace(llm, loss=kind),
            tiny_vision(),
            ProjectorConfig(name="mlp"),
            seed=0,
            image_token_id=IMAGE_TOKEN,
        ).eval()
    batch = together(each[Loss.full], learning_the_end(samples(each[Loss.full])))
    found = {kind: model(**batch.training_inputs(), use_cache=False).losses for kind, model in each.items()}
    torch.testing.assert_close(found[Loss.chunked], found[Loss.full], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("at_once", [64, 64 * 5, 2**24], ids=["one token", "five", "all"])
def test_chunks_of_any_size_give_the_loss_and_the_gradients_of_all_logits(
    at_once: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(PLANS["deepstack_l"], tied=tied)
    batch = together(model, learning_the_end(samples(model)))
    whole = model(**batch.model_inputs(), use_cache=False)
    learned = batch.labels[:, 1:] != IGNORE_INDEX
    plain = F.cross_entropy(whole.logits[:, :-1][learned], batch.labels[:, 1:][learned], reduction="sum")
    expected = gradients(model, plain)
    monkeypatch.setattr(loss, "AT_ONCE", at_once)
    monkeypatch.setattr(loss, "LEAST", 1)
    losses = model(**batch.training_inputs(), use_cache=False).losses
    torch.testing.assert_close(losses.sum(), plain, atol=1e-5, rtol=1e-6)
    same(gradients(model, losses.sum()), expected)


def test_no_more_logits_are_made_at_once_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = build(), []
    batch = together(model, learning_the_end(samples(model)))
    monkeypatch.setattr(loss, "AT_ONCE", 64 * 5)
    monkeypatch.setattr(loss, "LEAST", 1)
    model.get_output_embeddings().register_forward_hook(lambda *args: sizes.append(args[2].numel()))
    model(**batch.training_inputs(), use_cache=False).losses.sum().backward()
    assert max(sizes) == 64 * 5
    assert sum(sizes) == 2 * len(batch.learned_at) * 64, "once forward, once backward, for learned tokens alone"


def test_a_batch_with_nothing_to_learn_has_a_loss_of_zero_and_gradients_of_zero() -> None:
    model = build()
    each = samples(model)
    for sample in each:
        sample.labels = torch.full_like(sample.labels, IGNORE_INDEX)
    losses = model(**together(model, each).training_inputs(), use_cache=False).losses
    found = gradients(model, losses.sum())
    assert float(losses.sum()) == 0
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in found]
    assert not missing
    assert not any(values.any() for values in found.values())


def test_in_bfloat16_a_loss_is_computed_in_float32_from_the_logits_there_are() -> None:
    model = build().to(torch.bfloat16)
    batch = together(model, learning_the_end(samples(model)))
    losses = model(**batch.training_inputs(), use_cache=False).losses
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.learned_at]
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), batch.targets, reduction="none"))


def test_in_bfloat16_chunks_are_few_and_gradients_near_those_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary too: a chunk's part of the head's gradient is rounded to bfloat16, and so is every sum."""
    monkeypatch.setattr(loss, "AT_ONCE", 64)  # what a vocabulary of 2**24 would leave: a token
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(6000, 32, generator=draw).to(torch.bfloat16)
    targets = torch.randint(0, 64, (6000,), generator=draw)

    def learned(dtype: torch.dtype) -> tuple[list[Tensor], int]:
        llm = build().language_model
        for parameter in llm.parameters():  # the same values, of which float32 holds all
            parameter.data = parameter.to(torch.bfloat16).to(dtype)
        chunks = []
        llm.get_output_embeddings().register_forward_hook(lambda *args: chunks.append(args[2].shape[-2]))
        given = hidden.clone().to(dtype).requires_grad_()
        losses_after(llm, given, targets).mean().backward()
        head = llm.get_output_embeddings().weight.grad
        assert given.grad is not None
        return [head.float(), given.grad.float()], len(chunks) // 2

    (found, times), (expected, _) = learned(torch.bfloat16), learned(torch.float32)
    assert times == 12
    for mine, exact in zip(found, expected, strict=True):
        off = float((mine - exact).norm() / exact.norm())
        assert off < 0.006, off


def test_training_arguments_come_together() -> None:
    model = build()
    inputs = together(model, samples(model)).training_inputs()
    del inputs["targets"]
    with pytest.raises(ValueError, match="come together"):
        model(**inputs, use_cache=False)


def test_a_batch_knows_where_its_segments_lie() -> None:
    model = build()
    each = samples(model, [([1, 5, 6], []), ([1, 7], []), ([1, 8, 9, 10], []), ([1, IMAGE_TOKEN], [picture(0, 9, 9)])])
    batch = together(model, [each[:2], each[2:3], each[3:]])
    width = batch.input_ids.shape[1]
    assert batch.lengths == [3, 2, 4, width]
    assert batch.boundaries.tolist() == [0, 3, 5, width, width + 4, 2 * width, 3 * width]
    assert batch.longest == width
    assert batch.packed
    assert not together(model, each).packed
    starts = zip((0, 3, width, 2 * width), each, strict=True)
    at = [start + i for start, sample in starts for i in range(len(sample.input_ids) - 1)]
    learned = [i for i in at if batch.labels.flatten()[i + 1] != IGNORE_INDEX]
    assert batch.learned_at.tolist() == learned
    assert torch.equal(batch.targets, batch.labels.flatten()[batch.learned_at + 1])
    assert len(learned) == 2 + 1 + 3 + 0


class TestTorchsKernel:
    """What is handed to it, by a stand-in of each version's signature that computes one segment after another."""

    @staticmethod
    def of_2_10(
        q: Tensor, k: Tensor, v: Tensor, at: Tensor, _: Tensor, most: int, __: int, is_causal: bool = False
    ) -> Any:
        assert is_causal
        return attended(q, k, v, at, None, (-1, 0), most)

    @staticmethod
    def of_2_11(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: Tensor,
        _: Tensor,
        most: int,
        __: int,
        *,
        scale: Any = None,
        window_size: Any = (-1, -1),
    ) -> Any:
        return attended(q, k, v, at, scale, window_size, most)

    @staticmethod
    def of_2_12(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: Tensor,
        _: Tensor,
        most: int,
        __: int,
        *,
        scale: Any = None,
        window_size: Any = (-1, -1),
        enable_gqa: bool = False,
    ) -> Any:
        assert enable_gqa == (k.shape[1] < q.shape[1])
        return attended(
            q,
            k.repeat_interleave(q.shape[1] // k.shape[1], 1),
            v.repeat_interleave(q.shape[1] // k.shape[1], 1),
            at,
            scale,
            window_size,
            most,
        )

    @pytest.mark.parametrize("version", ["of_2_10", "of_2_11", "of_2_12"])
    @pytest.mark.parametrize("heads", [2, 4])
    @pytest.mark.parametrize("window", [None, 3])
    def test_it_is_given_what_it_takes(
        self, version: str, heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernel = getattr(self, version)
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(varlen, "_TAKES", inspect.signature(kernel).parameters)
        states = [torch.randn(1, each, 11, 8) for each in (4, heads, heads)]
        at = torch.tensor([0, 2, 7, 11], dtype=torch.int32)
        expected = varlen._each(*states, at, 0.7, window)[0]
        flat = [each[0].transpose(0, 1) for each in states]
        if version == "of_2_10" and window:
            with pytest.raises(ValueError, match=r"sees 3 positions back, .* from 2\.11 on"):
                varlen._kernel(*flat, at, 5, 0.7, window)
            return
        torch.testing.assert_close(varlen._kernel(*flat, at, 5, 0.7, window), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("heads", "window"), [(4, None), (2, None), (4, 3)], ids=["plain", "shared heads", "sliding window"]
    )
    def test_the_operator_itself_takes_what_it_is_given_forward_and_backward(
        self, heads: int, window: int | None
    ) -> None:
        """Without a GPU by its shapes alone: its signature, and that of its gradient, are real."""
        with FakeTensorMode():
            states = [torch.randn(11, each, 16, dtype=torch.bfloat16, requires_grad=True) for each in (4, heads, heads)]
            at = torch.empty(4, dtype=torch.int32)
            if window and "window_size" not in varlen._TAKES:  # torch 2.10: refused, not attended too far
                with pytest.raises(ValueError, match="sees 3 positions back, which torch's kernel does from"):
                    varlen._kernel(*states, at, 5, 0.7, window)
                return
            found = varlen._kernel(*states, at, 5, 0.7, window)
            assert (found.shape, found.dtype) == (states[0].shape, torch.bfloat16)
            found.sum().backward()
        for given in states:
            assert given.grad is not None
            assert given.grad.shape == given.shape

    @pytest.mark.parametrize("name", ["qwen3_0_6b", "phi3"], ids=["shared heads", "sliding window"])
    def test_where_there_is_a_kernel_a_model_gives_it_all_its_samples(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The branch of a GPU in half precision, with a stand-in for the kernel alone."""
        calls = []

        def kernel(q: Tensor, k: Tensor, v: Tensor, at: Tensor, longest: int, scale: Any, window: Any) -> Tensor:
            calls.append(longest)
            rows = [states.transpose(0, 1)[None] for states in (q, k, v)]
            return varlen._each(rows[0], rows[1], rows[2], at, scale, window)[0]

        model = host(name, attention=Attention.varlen)
        batch = together(model, [learning_the_end(samples(model))])
        expected = model(**batch.training_inputs(), use_cache=False).losses
        grads = gradients(model, expected.sum())
        monkeypatch.setattr(varlen, "_has_kernel", lambda query: True)
        monkeypatch.setattr(varlen, "_kernel", kernel)
        losses = model(**batch.training_inputs(), use_cache=False).losses
        torch.testing.assert_close(losses, expected)
        same(gradients(model, losses.sum()), grads)
        assert calls == [batch.longest] * LAYERS

    def test_the_kernel_is_for_half_precision_on_a_gpu(self) -> None:
        half = torch.empty(1, dtype=torch.bfloat16)
        assert not varlen._has_kernel(half)
        with FakeTensorMode():
            assert varlen._has_kernel(torch.empty(1, dtype=torch.bfloat16, device="cuda"))
            assert not varlen._has_kernel(torch.empty(1, device="cuda"))


def attended(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, scale: float | None, window: tuple[int, int], most: int
) -> Tensor:
    """Attention of each segment by its definition; ``window`` positions back and ahead, -1 for all."""
    assert window[1] == 0, "nothing ahead is seen"
    assert int(at.diff().max()) == most
    assert q.shape[1] == k.shape[1]
    place = torch.arange(len(q))
    owner = torch.bucketize(place, at.long(), right=True)
    back = place[:, None] - place
    seen = (owner[:, None] == owner) & (back >= 0) & ((back <= window[0]) | (window[0] < 0))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
