"""Before a run, training's forward pass answers as the logits do, or nothing is trained."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import LLM, small_model, small_processor
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.inspection.record import ReceiptError
from deepstack_pl.inspection.rehearsal import rehearse
from deepstack_pl.language import loss, varlen
from deepstack_pl.language.config import Attention, Loss
from deepstack_pl.training.compiling import compile_blocks

KERNELS = [Attention.eager, Attention.sdpa, Attention.varlen]


def rehearsed(one_row: bool = True, **llm: Any) -> str:
    model = small_model(llm=replace(LLM, **llm)).train()
    said = rehearse(model, small_processor(), torch.float32, nullcontext, one_row=one_row)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    return said


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_samples_of_one_row_answer_as_alone(kernel: Attention) -> None:
    assert "3 samples of one row do not see each other" in rehearsed(attention=kernel)


@pytest.mark.parametrize("kind", Loss, ids=lambda kind: kind.name)
def test_rows_of_one_sample_are_only_compared_with_their_logits(kind: Loss) -> None:
    said = rehearsed(one_row=False, loss=kind)
    assert "losses as by the logits, within" in said
    assert "see each other" not in said


@pytest.mark.parametrize("kernel", [Attention.eager, Attention.sdpa], ids=lambda kernel: kernel.name)
def test_a_mask_that_lets_samples_see_each_other_stops_the_run(
    kernel: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent trap: given a mask, transformers makes no other of the positions."""
    inputs = MultimodalBatch.training_inputs

    def masked(batch: MultimodalBatch) -> dict[str, Any]:
        return inputs(batch) | {"attention_mask": batch.attention_mask}

    monkeypatch.setattr(MultimodalBatch, "training_inputs", masked)
    with pytest.raises(ReceiptError, match=r"the forward pass of training gives|samples of one row see each other"):
        rehearsed(attention=kernel)


def test_samples_that_see_each_other_a_little_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little that losses hardly change: what one says must change nothing of another."""
    each: Any = varlen._each

    def leaking(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        return each(query, key, value + 1e-6 * value.mean(2, keepdim=True), *rest)

    monkeypatch.setattr(varlen, "_each", leaking)
    with pytest.raises(ReceiptError, match=r"samples of one row see each other: a change of receipt row 0.*varlen"):
        rehearsed(attention=Attention.varlen)


def test_compiled_blocks_that_let_samples_see_each_other_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run with gradients alone, and so must what is asked of them."""

    def leaking(written: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            found = written(*args, **kwargs)
            return found + 1e-5 * found.mean(1, keepdim=True)

        return run

    model = small_model().train()
    monkeypatch.setattr(torch, "compile", leaking)
    compile_blocks(model)
    with pytest.raises(ReceiptError, match="samples of one row see each other: a change of receipt row 0"):
        rehearse(model, small_processor(), torch.float32, nullcontext, one_row=True)


def test_a_head_that_is_not_the_models_own_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = loss.logits_of
    monkeypatch.setattr(loss, "logits_of", lambda llm, hidden: own(llm, hidden) * 2)
    with pytest.raises(ReceiptError, match=r"gives receipt row \d a loss of [\d.]+, its logits one of"):
        rehearsed(one_row=False)


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = loss.logits_of
    monkeypatch.setattr(loss, "logits_of", lambda llm, hidden: own(llm, hidden) * float("nan"))
    with pytest.raises(ReceiptError, match="a loss of nan"):
        rehearsed(one_row=False)


def test_learned_tokens_that_are_left_out_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = MultimodalBatch.training_inputs

    def shifted(batch: MultimodalBatch) -> dict[str, Any]:
        given = inputs(batch)
        return given | {"learned_at": given["learned_at"] - 1}

    monkeypatch.setattr(MultimodalBatch, "training_inputs", shifted)
    with pytest.raises(ReceiptError, match="a loss of"):
        rehearsed(one_row=False)
