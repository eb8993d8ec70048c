"""What a receipt looks at: a synthetic batch with full grids, and forward passes watched from outside.

Axes: ``b t`` positions, ``v`` views, ``k t`` views in the tower and their tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.language.template import UserText
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Dealt, Host, Newline, Source
from deepstack_pl.stacking.injection import NOTHING, InjectionTrace
from deepstack_pl.stacking.plan import Injection, Plan
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import full_grid_size

IMAGES = 3  # of a probe batch: one in one row, two in another
_OPENED = 0.5  # what a closed gate is set to for the length of a pass
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Observed:
    """One forward pass.

    Attributes:
        layers: for each layer of each host a checksum of its output, bit by bit.
        views: the views that entered, a leaf of the graph where gradients were on.
        gates: the gates that were used in place of the model's own.
    """

    loss: Tensor
    logits: Tensor
    traces: list[InjectionTrace]
    layers: dict[tuple[Host, int], int]
    views: Tensor
    gates: dict[str, Tensor]


def probe_images(plan: Plan, vision: VisionConfig) -> list[Image.Image]:
    """Images that fill the plan's largest grid, with a colour of its own for every patch of the finest views: no two
    tokens are alike.
    """
    width, height = (pixels * plan.detail for pixels in full_grid_size(plan, vision))
    shape = (IMAGES, height // vision.patch_size, width // vision.patch_size, 3)
    pages = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(page).resize((width, height), Image.Resampling.BICUBIC) for page in pages]


def probe_batch(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> MultimodalBatch:
    """Rows with one image and with two, after one without, unless the template cannot write that."""
    roomy = copy(processor)
    roomy.max_length = 2**31  # the probe is no training sample: two full grids may be longer than one of those
    images = probe_images(model.plan, processor.vision)
    rows = [images[:1], images[1:]]
    if processor.template.user_text is not UserText.images_only:
        rows.insert(0, [])
    samples = [
        roomy.prepare(
            Record(
                key=f"receipt row {number}",
                turns=(Turn(Role.user, "<image>" * len(row) + "What is this?"), Turn(Role.assistant, "a page")),
                images=tuple(row),
            )
        )
        for number, row in enumerate(rows)
    ]
    return roomy.collate(samples).to(model.device)


def run(
    model: DeepStackForConditionalGeneration,
    batch: MultimodalBatch,
    gates: dict[str, Tensor],
    changes: dict[str, Tensor] | None = None,
    *,
    gradients: bool = False,
) -> Observed:
    """One pass over ``batch`` with ``changes`` to its tensors; ``gates`` stand in for the model's own."""
    inputs: dict[str, Any] = {**batch.model_inputs(), **(changes or {})}
    views = inputs["views"].detach().clone().requires_grad_(gradients)
    inputs["views"] = views
    with torch.set_grad_enabled(gradients), _watched(model) as layers:
        leaves = {name: gate.detach().clone().requires_grad_(gradients) for name, gate in gates.items()}
        output = functional_call(model, leaves, (), {**inputs, "use_cache": False, "record": True})
    return Observed(output.loss, output.logits, output.record, layers, views, leaves)


def own_gates(model: DeepStackForConditionalGeneration) -> dict[str, Tensor]:
    """The gates as they are."""
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith("gates.")}


def opened(gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same gates, with those that are exactly closed set open."""
    return {name: torch.where(gate == 0, torch.full_like(gate, _OPENED), gate) for name, gate in gates.items()}


def owners(
    batch: MultimodalBatch, injection: Injection, like: Tensor, image_token_id: int, plan: Plan, vision: VisionConfig
) -> Int[Tensor, "..."]:
    """For each position of ``injection``'s host the image that it belongs to and that it adds to, -1 for none.

    Found without the processor's index: in the LLM from the placeholders' ids, in the tower from the order of views.
    """
    found = torch.full(like.shape, -1, dtype=torch.long, device=like.device)
    if injection.host is Host.vit:
        patches = vision.patches_per_side**2
        found[:IMAGES, like.shape[1] - patches :] = torch.arange(IMAGES, device=like.device)[:, None]
        return found
    slots = int((batch.input_ids == image_token_id).sum()) // IMAGES  # of each: all images are alike in size
    first = 0
    for row, ids in enumerate(batch.input_ids):
        places = (ids == image_token_id).nonzero().squeeze(-1)
        order = torch.arange(len(places), device=places.device)
        receives = _receives(order % slots, injection, plan, vision)
        found[row, places[receives]] = (first + order // slots)[receives]
        first += len(places) // slots
    return found


def _receives(slot: Int[Tensor, " n"], injection: Injection, plan: Plan, vision: VisionConfig) -> Tensor:
    """Which slots of a full image ``injection`` adds to: the global view's, or with detail every view's."""
    side = vision.patches_per_side // plan.pooling
    if injection.source is not Source.detail:
        return slot < side**2
    if plan.newline is not Newline.rows:
        return slot >= 0
    row = full_grid(plan, vision)[0] * side + 1
    return (slot < side**2) | ((slot - side**2) % row != row - 1)  # but for the newlines


def full_grid(plan: Plan, vision: VisionConfig) -> tuple[int, int]:
    """Columns and rows of the plan's largest grid; 0 x 0 without tiles."""
    width, height = full_grid_size(plan, vision)
    return (width // vision.image_size, height // vision.image_size) if plan.tiles else (0, 0)


def views_by_source(plan: Plan, vision: VisionConfig) -> dict[Source, list[list[int]]]:
    """For each source, image by image of the probe, its views' places in the batch."""
    columns, rows = full_grid(plan, vision)
    tiles, others = columns * rows, plan.views(columns * rows) - 1
    found: dict[Source, list[list[int]]] = {Source.global_view: [[image] for image in range(IMAGES)]}
    starts = [IMAGES + image * others for image in range(IMAGES)]
    found[Source.tiles] = [list(range(start, start + tiles)) for start in starts]
    found[Source.detail] = [list(range(start + tiles, start + others)) for start in starts]
    return found


def with_others(batch: MultimodalBatch, places: list[int]) -> Tensor:
    """The batch's views, with those at ``places`` as their own negatives."""
    views = batch.views.clone()
    views[places] *= -1
    return views


def without_group(batch: MultimodalBatch, injection: Injection, groups: tuple[Dealt, ...]) -> dict[str, Tensor]:
    """The change to the batch that leaves ``injection``'s group out of its host."""
    name = "group_rows" if injection.host is Host.llm else "vit_rows"
    rows = batch.model_inputs()[name].clone()
    rows[groups.index(injection.dealt)] = NOTHING
    return {name: rows}


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _watched(model: DeepStackForConditionalGeneration) -> Iterator[dict[tuple[Host, int], int]]:
    """Checksums of what each layer hands on. Observers only: a trace says where its hook believes it is."""
    seen: dict[tuple[Host, int], int] = {}
    hosts = {Host.llm: decoder_layers(model.language_model), Host.vit: model.vision_tower.tower.blocks}
    with ExitStack() as stack:
        for host, layers in hosts.items():
            for number, layer in enumerate(layers):

                def look(module: nn.Module, args: Any, output: Any, place: tuple[Host, int] = (host, number)) -> None:
                    hidden = (output[0] if isinstance(output, tuple) else output).detach()
                    seen[place] = int(hidden.contiguous().view(_BITS[hidden.element_size()]).sum(dtype=torch.int64))

                stack.callback(layer.register_forward_hook(look).remove)
        yield seen
