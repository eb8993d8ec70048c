"""The forward pass of training, tried before it.

The receipt reads logits, a sample a row. Training reads losses of learned tokens, of rows that may hold several
samples, through kernels without masks and compiled blocks: any of these could be wrong in silence. So the receipt's
samples are asked both ways.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, Sample
from deepstack_pl.inspection.probe import probe_samples, quiet
from deepstack_pl.inspection.record import ReceiptError
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor

_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of a sample's mean loss

Losses = dict[str, Tensor]  # of each sample, by its key


def rehearse(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    dtype: torch.dtype,
    precision: Callable[[], AbstractContextManager[None]],
    *,
    one_row: bool,
) -> str:
    """What was found, in a sentence. ``precision`` is the context that training computes in, ``dtype`` what it computes
    with; ``one_row``: whether rows of training hold several samples. Where weights are shared out all processes must
    call it.

    Raises:
        ReceiptError: a sample's losses are others than by itself, or depend on another sample of its row.
    """
    samples = probe_samples(model, processor)
    rows = [samples] if one_row else samples
    with quiet(model):
        with torch.no_grad(), precision():
            alone = {key: loss for sample in samples for key, loss in _alone(model, processor, sample).items()}
        with torch.enable_grad(), precision():
            together = _trained(model, processor.collate(rows))
        off = {key: _off(together[key], alone[key]) for key in alone}
        worst = max(off, key=lambda key: off[key])
        if not off[worst] <= _BOUNDS[dtype]:
            raise ReceiptError(
                f"the forward pass of training gives {worst} a loss of {float(together[worst].mean()):.4f}, its logits "
                f"one of {float(alone[worst].mean()):.4f}. It is llm.loss, llm.attention, data.batching or compile: "
                "say llm.loss=full, llm.attention=sdpa, data.batching=samples, compile=false in turn, and report this."
            )
        said = f"training's forward pass: losses as by the logits, within {off[worst]:.1e}"
        if not one_row:
            return said
        with torch.enable_grad(), precision():  # without gradients compiled blocks would run as written
            before = _trained(model, processor.collate(rows))
            after = _trained(model, processor.collate([[_changed(samples[0]), *samples[1:]]]))
    seen = [sample.key for sample in samples[1:] if not torch.equal(before[sample.key], after[sample.key])]
    if seen or torch.equal(before[samples[0].key], after[samples[0].key]):
        kernel = model.language_model.config._attn_implementation
        raise ReceiptError(
            f"samples of one row see each other: a change of {samples[0].key} changed the losses of "
            f"{', '.join(seen) or 'none, not even its own'}. llm.attention={kernel} "
            "does not keep them apart with this LLM: say data.batching=samples llm.attention=sdpa, and report this."
        )
    return f"{said}; {len(samples)} samples of one row do not see each other"


def _alone(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor, sample: Sample) -> Losses:
    batch = processor.collate([sample]).to(model.device)
    logits = model(**batch.model_inputs(), use_cache=False).logits[0, :-1]
    labels = batch.labels[0, 1:]
    learned = labels != IGNORE_INDEX
    return {sample.key: F.cross_entropy(logits[learned].float(), labels[learned], reduction="none")}


def _trained(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> Losses:
    batch = batch.to(model.device)
    losses = model(**batch.training_inputs(), use_cache=False).losses
    losses.sum().backward()  # what shares weights out gathers them again for it, and lets them go after it
    model.zero_grad()
    owners = batch.sample_ids().flatten()[batch.learned_at]
    return {key: losses.detach()[owners == place] for place, key in enumerate(batch.keys)}


def _off(found: Tensor, expected: Tensor) -> float:
    """How far mean losses lie apart, in shares of what is expected; infinite for other tokens."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.mean() - expected.mean()).abs() / expected.mean().abs().clamp_min(1.0))


def _changed(sample: Sample) -> Sample:
    """Another sample of the same shape, key and places to learn."""
    text = sample.token_index < 0
    ids = sample.input_ids.clone()
    ids[text] = ids[text].roll(1)
    return replace(sample, input_ids=ids, views=255 - sample.views)
