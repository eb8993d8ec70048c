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
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from deepstack_pl.batch import MultimodalBatch, Record, Role, Sample, Turn
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.language.template import UserText
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Dealt, GridRule, Host, Newline, Source
from deepstack_pl.stacking.injection import NOTHING, InjectionTrace
from deepstack_pl.stacking.plan import Injection, Plan
from deepstack_pl.stacking.rules import ALIGNED, WITH_TILES
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import full_grid_size, normalise

IMAGES = 3  # of a probe batch: one in one row, two in another
_OPENED = 0.5  # what a closed gate is set to for the length of a pass
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Observed:
    """One forward pass.

    Attributes:
        layers: for each layer of each host a checksum of its output, bit by bit.
        views: the views that entered; normalised and a leaf of the graph where gradients were on.
        embeds: what entered the LLM.
        gates: the gates that were used in place of the model's own.
    """

    loss: Tensor
    logits: Tensor
    traces: list[InjectionTrace]
    layers: dict[tuple[Host, int], int]
    views: Tensor
    gates: dict[str, Tensor]
    embeds: Tensor


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images that all become one grid of tiles (columns, rows; 0 x 0: none)."""

    images: list[Image.Image]
    grid: tuple[int, int]


def full_pictures(plan: Plan, vision: VisionConfig) -> Pictures:
    """Three images that fill the plan's largest grid exactly."""
    width, height = full_grid_size(plan, vision)
    grid = (width // vision.image_size, height // vision.image_size) if plan.tiles else (0, 0)
    return Pictures(probe_images(plan, vision), grid)


def oblong_pictures(plan: Plan, vision: VisionConfig) -> Pictures | None:
    """An image that becomes one column of tiles, fewer than the largest grid has where it can, and does not fill it
    exactly. None where the plan has but one grid.
    """
    if not plan.tiles or plan.grid is GridRule.square:
        return None
    rows = max(2, plan.tiles - 1)
    width, height = vision.image_size - vision.patch_size // 2, rows * vision.image_size
    shape = (rows * vision.patches_per_side, vision.patches_per_side, 3)
    page = Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    return Pictures([page.resize((width, height), Image.Resampling.BICUBIC)], (1, rows))


def probe_images(plan: Plan, vision: VisionConfig) -> list[Image.Image]:
    """Images that fill the plan's largest grid, with a colour of its own for every patch of the finest views: no two
    tokens are alike.
    """
    width, height = (pixels * plan.detail for pixels in full_grid_size(plan, vision))
    side = vision.patches_per_side  # not pixels / patch_size: a view may end in pixels that no patch sees
    shape = (IMAGES, height // vision.image_size * side, width // vision.image_size * side, 3)
    pages = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(page).resize((width, height), Image.Resampling.BICUBIC) for page in pages]


def probe_batch(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> MultimodalBatch:
    """The probe's samples, a row each."""
    return processor.collate(probe_samples(model, processor)).to(model.device)


def probe_samples(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> list[Sample]:
    """With one image and with two, after one without, unless the template cannot write that."""
    images = probe_images(model.plan, processor.vision)
    rows = [images[:1], images[1:]]
    if processor.template.user_text is not UserText.images_only:
        rows.insert(0, [])
    return samples_of(rows, processor)


def samples_of(rows: list[list[Image.Image]], processor: DeepStackProcessor) -> list[Sample]:
    """A text for each list of images."""
    roomy = copy(processor)
    roomy.max_length = 2**31  # the probe is no training sample: two full grids may be longer than one of those
    return [
        roomy.prepare(
            Record(
                key=f"receipt row {number}",
                turns=(Turn(Role.user, "<image>" * len(row) + "What is this?"), Turn(Role.assistant, "a page")),
                images=tuple(row),
            )
        )
        for number, row in enumerate(rows)
    ]


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
    if gradients:  # else they enter as in training: levels have no gradient
        pixels = normalise(inputs["views"], model.vision_tower.tower.config)
        inputs["views"] = pixels.detach().clone().requires_grad_()
    with torch.set_grad_enabled(gradients), _watched(model) as (layers, entered):
        leaves = {name: gate.detach().clone().requires_grad_(gradients) for name, gate in gates.items()}
        output = functional_call(model, leaves, (), {**inputs, "use_cache": False, "record": True})
    return Observed(output.loss, output.logits, output.record, layers, inputs["views"], leaves, entered[0])


def own_gates(model: DeepStackForConditionalGeneration) -> dict[str, Tensor]:
    """The gates as they are."""
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith("gates.")}


def opened(gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same gates, with those that are exactly closed set open."""
    return {name: torch.where(gate == 0, torch.full_like(gate, _OPENED), gate) for name, gate in gates.items()}


def owners(
    batch: MultimodalBatch, injection: Injection, like: Tensor, pictures: Pictures, processor: DeepStackProcessor
) -> Int[Tensor, "..."]:
    """For each position of ``injection``'s host the image that it belongs to and that it adds to, -1 for none.

    Found without the processor's index: in the LLM from the placeholders' ids, in the tower from the order of views.
    """
    plan, vision, images = processor.plan, processor.vision, len(pictures.images)
    found = torch.full(like.shape, -1, dtype=torch.long, device=like.device)
    if injection.host is Host.vit:
        patches = vision.patches_per_side**2
        found[:images, like.shape[1] - patches :] = torch.arange(images, device=like.device)[:, None]
        return found
    visual = batch.input_ids == processor.image_token_id
    slots = int(visual.sum()) // images  # of each: all images are alike in size
    first = 0
    for row, here in enumerate(visual):
        places = here.nonzero().squeeze(-1)
        order = torch.arange(len(places), device=places.device)
        receives = _receives(order % slots, injection, plan, vision, pictures.grid[0])
        found[row, places[receives]] = (first + order // slots)[receives]
        first += len(places) // slots
    return found


def _receives(slot: Int[Tensor, " n"], injection: Injection, plan: Plan, vision: VisionConfig, columns: int) -> Tensor:
    """Which slots of an image ``injection`` adds to: the global view's, or with detail every view's."""
    side = vision.patches_per_side // plan.pooling
    aligned = injection.source in ALIGNED
    if injection.source is not Source.detail and not aligned:
        return slot < side**2
    if plan.newline is Newline.none or (plan.newline is Newline.rows_and_groups and not aligned):
        return slot >= 0
    row = columns * side + 1
    return (slot < side**2) | ((slot - side**2) % row != row - 1)  # but for the newlines


def views_by_source(plan: Plan, pictures: Pictures) -> dict[Source, list[list[int]]]:
    """For each source, image by image, its views' places in the batch."""
    images, tiles = len(pictures.images), pictures.grid[0] * pictures.grid[1]
    others = plan.views(tiles) - 1
    found: dict[Source, list[list[int]]] = {Source.global_view: [[image] for image in range(images)]}
    starts = [images + image * others for image in range(images)]
    found[Source.tiles] = [list(range(start, start + tiles)) for start in starts]
    found[Source.detail] = [list(range(start + tiles, start + others)) for start in starts]
    in_text = found[Source.tiles] if plan.sequence in WITH_TILES else [[]] * images
    found |= {
        source: [[*small, *own] for small, own in zip(found[Source.global_view], in_text, strict=True)]
        for source in ALIGNED
    }
    return found


def with_others(batch: MultimodalBatch, places: list[int]) -> UInt8[Tensor, "v 3 s s"]:
    """The batch's views, with those at ``places`` as their own negatives."""
    views = batch.views.clone()
    views[places] = 255 - views[places]
    return views


def without_group(batch: MultimodalBatch, injection: Injection, groups: tuple[Dealt, ...]) -> dict[str, Tensor]:
    """The change to the batch that leaves ``injection``'s group out of its host."""
    name = "group_rows" if injection.host is Host.llm else "vit_rows"
    rows = batch.model_inputs()[name].clone()
    rows[groups.index(injection.dealt)] = NOTHING
    return {name: rows}


def without_groups(batch: MultimodalBatch) -> dict[str, Tensor]:
    """The change to the batch that leaves every group out of both hosts."""
    inputs = batch.model_inputs()
    return {name: torch.full_like(inputs[name], NOTHING) for name in ("group_rows", "vit_rows")}


@contextmanager
def replaced(model: DeepStackForConditionalGeneration, gates: dict[str, Tensor]) -> Iterator[None]:
    """The model with ``gates`` in the place of its own."""
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in gates}
    with torch.no_grad():
        try:
            for name, gate in gates.items():
                model.get_parameter(name).copy_(gate)
            yield
        finally:
            for name, gate in own.items():
                model.get_parameter(name).copy_(gate)


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
def _watched(
    model: DeepStackForConditionalGeneration,
) -> Iterator[tuple[dict[tuple[Host, int], int], list[Tensor]]]:
    """Checksums of what each layer hands on, and what enters the LLM. Observers only: a trace says where its hook
    believes it is.
    """
    seen: dict[tuple[Host, int], int] = {}
    entered: list[Tensor] = []
    hosts = {Host.llm: decoder_layers(model.language_model), Host.vit: model.vision_tower.tower.blocks}
    with ExitStack() as stack:
        for host, layers in hosts.items():
            for number, layer in enumerate(layers):

                def look(module: nn.Module, args: Any, output: Any, place: tuple[Host, int] = (host, number)) -> None:
                    hidden = (output[0] if isinstance(output, tuple) else output).detach()
                    seen[place] = int(hidden.contiguous().view(_BITS[hidden.element_size()]).sum(dtype=torch.int64))

                stack.callback(layer.register_forward_hook(look).remove)

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            entered.append(kwargs["inputs_embeds"].detach())

        stack.callback(model.language_model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield seen, entered
