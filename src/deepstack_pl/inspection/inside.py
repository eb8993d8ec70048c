"""What injections do inside, on some answered records: no weight, mode, gradient or random number is changed.

How strong each addition is beside the residual stream, where it points, what the loss asks of it, and what the loss is
without it: which layers use the detail? And how much the positions that write an answer attend to the visual ones.
Axes: ``b t`` positions, ``h`` heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, Record
from deepstack_pl.inspection.probe import quiet, without_group, without_groups
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Injection
from deepstack_pl.stacking.config import Sequence as InText

_MOST = 4 * 2**30  # bytes of attention maps that are looked at


@dataclass(frozen=True, slots=True)
class Effect:
    """One injection.

    Attributes:
        added, stream: root mean square of what is added, and of the residual stream before.
        cosine: between the two, the mean over positions.
        gradient: norm of the loss's gradient in what is added, in the first record with an image; None where weights
            are shared out.
        left_out: loss per learned token without its group, minus that with all.
    """

    injection: Injection
    added: float
    stream: float
    cosine: float
    gradient: float | None
    left_out: float

    @property
    def place(self) -> str:
        return f"{self.injection.host.value} layer {self.injection.layer:02} {self.injection.what}"

    @property
    def ratio(self) -> float:
        """The addition's size over the stream's."""
        return self.added / self.stream if self.stream else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"place": self.place, **{k: v for k, v in asdict(self).items() if k != "injection"}}


@dataclass(frozen=True, slots=True)
class Attention:
    """What positions that write an answer attend to, in the first record with an image; means over them and over heads.

    Attributes:
        with_all, without: by layer, the share of attention on visual positions, with all injections and with none.
        layer: the one whose map is drawn: where the share is largest.
        grid: attention of the first answer token on its first image's global view, patch by patch; None where the text
            holds no global view.
    """

    with_all: list[float]
    without: list[float]
    layer: int
    grid: Float[ndarray, "p p"] | None


@dataclass(frozen=True, slots=True)
class Inside:
    """Attributes:
    loss, loss_without: per learned token, with all injections and with none.
    note: why there is no attention, where there is none.
    """

    loss: float
    loss_without: float
    effects: list[Effect]
    attention: Attention | None
    note: str = ""

    def scalars(self) -> dict[str, float]:
        """By the names under which TensorBoard shows them."""
        found: dict[str, float] = {}
        for effect in self.effects:
            found[f"injection added over stream/{effect.place}"] = effect.ratio
            found[f"injection added rms/{effect.place}"] = effect.added
            found[f"injection stream rms/{effect.place}"] = effect.stream
            found[f"injection cosine/{effect.place}"] = effect.cosine
            if effect.gradient is not None:
                found[f"injection gradient/{effect.place}"] = effect.gradient
            found[f"loss without/{effect.place}"] = effect.left_out
        if self.effects:
            found["loss without/all of them"] = self.loss_without - self.loss
        if self.attention is not None:
            for layer, share in enumerate(self.attention.with_all):
                found[f"attention on visual tokens/layer {layer:02}"] = share
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        attention = None
        if self.attention is not None:
            attention = asdict(self.attention)
            attention["grid"] = None if self.attention.grid is None else self.attention.grid.tolist()
        losses = {"loss": self.loss, "loss_without": self.loss_without}
        return {**losses, "effects": [e.to_dict() for e in self.effects], "attention": attention, "note": self.note}


def look_inside(
    model: DeepStackForConditionalGeneration, processor: DeepStackProcessor, records: Sequence[Record]
) -> Inside:
    """Run ``records`` with their answers: once as they are, once for each group left out, once without any. The first
    with an image once more for gradients, by itself as a step's smallest micro-batch, and twice with eager attention.
    Nothing is compiled for it.
    """
    batch = processor.collate([processor.prepare(record) for record in records]).to(model.device)
    shown = [processor.prepare(record) for record in records if record.images][:1]
    one = processor.collate(shown).to(model.device) if shown else None
    with quiet(model), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        effects, loss = _effects(model, batch, one)
        without = _loss(model, batch, without_groups(batch))
        attention, note = None, "no attention on visual tokens: none of the pages has an image"
        if one is not None:
            attention, note = _attention(model, processor, one)
    return Inside(loss, without, effects, attention, note)


def _effects(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch, one: MultimodalBatch | None
) -> tuple[list[Effect], float]:
    norms = {} if one is None else _gradients(model, one)
    with torch.no_grad():
        output = model(**batch.model_inputs(), use_cache=False, record=True)
    loss, left_out = float(output.loss), dict[Any, float]()
    effects = []
    for trace in output.record:
        injection = trace.injection
        group = (injection.host, injection.dealt)
        if group not in left_out:
            change = without_group(batch, injection, model.plan.groups(injection.host))
            left_out[group] = _loss(model, batch, change) - loss
        sizes = float(trace.added_rms), float(trace.hidden_rms), float(trace.cosine)
        effects.append(Effect(injection, *sizes, norms.get(injection), left_out[group]))
    return effects, loss


def _gradients(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> dict[Injection, float]:
    """Norms at the positions that were touched; parameters get none."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return {}
    with torch.enable_grad():
        output = model(**batch.model_inputs(), use_cache=False, record=True)
        traces = [trace for trace in output.record if trace.added.requires_grad]
        found = torch.autograd.grad(output.loss, [trace.added for trace in traces]) if traces else ()
    return {
        trace.injection: float((gradient * trace.touched.unsqueeze(-1)).norm())
        for trace, gradient in zip(traces, found, strict=True)
    }


def _loss(model: DeepStackForConditionalGeneration, batch: MultimodalBatch, change: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(model(**{**batch.model_inputs(), **change}, use_cache=False).loss)


def _attention(
    model: DeepStackForConditionalGeneration, processor: DeepStackProcessor, batch: MultimodalBatch
) -> tuple[Attention | None, str]:
    visual = batch.input_ids == processor.image_token_id
    asks = torch.zeros_like(visual)  # positions that write a learned token: the one before it
    asks[:, :-1] = batch.labels[:, 1:] != IGNORE_INDEX
    config, length = model.language_model.config, visual.shape[1]
    takes = config.num_hidden_layers * config.num_attention_heads * length**2 * model.dtype.itemsize
    if takes > _MOST:
        return None, f"no attention maps: those of {length} positions would take {takes / 2**30:.0f} GiB"
    try:
        with _eager(model), torch.no_grad():
            maps = _maps(model, batch, {})
            with_all = [_share(each, asks, visual) for each in maps]
            bare = with_all
            if model.plan.injections:
                bare = [_share(each, asks, visual) for each in _maps(model, batch, without_groups(batch))]
    except (ValueError, RuntimeError) as error:  # an LLM without eager attention, or a device without room
        return None, f"no attention maps: {type(error).__name__}: {error}"
    layer = max(range(len(with_all)), key=lambda number: with_all[number])
    return Attention(with_all, bare, layer, _grid(maps[layer], asks, visual, processor)), ""


def _maps(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch, change: dict[str, Tensor]
) -> list[Float[Tensor, "b t t"]]:
    """By layer, attention averaged over heads."""
    output = model(**{**batch.model_inputs(), **change}, use_cache=False, output_attentions=True)
    if not output.attentions or any(each is None for each in output.attentions):
        raise ValueError(f"{model.config.text_config.model_type} does not hand its attention out.")
    return [each.float().mean(1) for each in output.attentions]


@contextmanager
def _eager(model: DeepStackForConditionalGeneration) -> Iterator[None]:
    """Attention that can be looked at, for as long as it lasts."""
    llm = model.language_model
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


def _share(attention: Float[Tensor, "b t t"], asks: Bool[Tensor, "b t"], visual: Bool[Tensor, "b t"]) -> float:
    """Of what positions that write attend to, how much is visual."""
    on_visual = (attention * visual[:, None, :]).sum(-1)
    whole = attention.sum(-1)
    return float(on_visual[asks].sum() / whole[asks].sum())


def _grid(
    attention: Float[Tensor, "b t t"],
    asks: Bool[Tensor, "b t"],
    visual: Bool[Tensor, "b t"],
    processor: DeepStackProcessor,
) -> Float[ndarray, "p p"] | None:
    """What the first answer token of the first record with an image attends to on its global view."""
    if processor.plan.sequence is InText.tiles:
        return None
    row = int(visual.any(-1).nonzero()[0])
    if not bool(asks[row].any()):
        return None
    tokens = processor.tokens_per_view
    places = visual[row].nonzero().squeeze(-1)[:tokens]  # the global view's come first
    values = attention[row, int(asks[row].nonzero()[0]), places].cpu().numpy()
    side = isqrt(tokens)
    return values.reshape(side, side).astype(np.float64)
