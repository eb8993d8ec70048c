"""Views and their tokens, made the slow way for receipts: cut by hand, projected one by one, averaged corner by corner.

What the product makes of tiles as a batch is made here of each picture. The tower's blocks and a projector's layers are
the product's own, as are the filters that resize: they are what is trusted. Axes: ``v`` views, ``p2`` patches of a
view, ``q2`` tokens of a pooled one, ``d e`` widths of tower and LLM.
"""

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from deepstack_pl.inspection.probe import Pictures
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.projector import TwoProjectors
from deepstack_pl.stacking.config import Encoding, Host, Resize
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.resize import resizer


def cut_by_hand(
    plan: Plan, vision: VisionConfig, pictures: Pictures, backend: ViewsBackend
) -> Float[Tensor, "v 3 s s"]:
    """Global views; then, image by image, tiles and the details of each view, in raster order. Normalised."""
    size, (columns, rows) = vision.image_size, pictures.grid
    cut = [_stretched(image, size, size, backend) for image in pictures.images]
    fine = plan.detail if plan.detail > 1 else 0
    for image in pictures.images:
        if columns:
            full = (columns * size, rows * size)
            enlarge = _boxed if plan.resize is Resize.letterbox else _stretched
            cut += _cells(enlarge(image, *full, backend), size, (0, 0, columns, rows))
        if fine:
            whole = _stretched(image, fine * size, fine * size, backend)
            cut += _cells(whole, size, (0, 0, fine, fine))
        for y in range(rows if fine else 0):
            for x in range(columns):
                large = _stretched(image, columns * fine * size, rows * fine * size, backend)
                cut += _cells(large, size, (x * fine, y * fine, (x + 1) * fine, (y + 1) * fine))
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in cut])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    return ((pixels - mean) / std).contiguous()


def _stretched(image: Image.Image, width: int, height: int, backend: ViewsBackend) -> Image.Image:
    """As the filter makes it; filters are trusted."""
    return Image.fromarray(resizer(image, backend)(width, height))


def _boxed(image: Image.Image, width: int, height: int, backend: ViewsBackend) -> Image.Image:
    """``image`` in its own shape, centred on black: one side is filled, the other rounded up."""
    filled = min(width / image.width, height / image.height)
    across, down = min(width, ceil(image.width * filled)), min(height, ceil(image.height * filled))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(_stretched(image, across, down, backend), ((width - across) // 2, (height - down) // 2))
    return canvas


def _cells(large: Image.Image, size: int, box: tuple[int, int, int, int]) -> list[Image.Image]:
    """The cells of ``box`` (left, top, right, bottom, in cells of ``size`` pixels)."""
    left, top, right, bottom = box
    return [
        large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(top, bottom)
        for x in range(left, right)
    ]


def features(
    model: DeepStackForConditionalGeneration,
    views: Float[Tensor, "v 3 s s"],
    vit_rows: Tensor,
    pictures: Pictures,
) -> Float[Tensor, "k p2 d"]:
    """What the tower makes of the views that reach the LLM; an enlarged image that it reads in one pass is put together
    from pixels.
    """
    tower = model.vision_tower.tower
    views = views.to(tower.dtype)
    if model.plan.encoding is Encoding.separate:
        return model.vision_tower(views, vit_rows, model._scales(Host.vit))
    blocks, (columns, rows), images = tower.blocks[: model.plan.vit_layers], pictures.grid, len(pictures.images)
    found, tiles = [_through(tower.embed(views[:images]), blocks)[:, tower.prefix :]], columns * rows
    for image in range(images):
        cut = views[images + image * tiles : images + (image + 1) * tiles]
        whole = torch.cat([torch.cat(list(cut[y * columns : (y + 1) * columns]), dim=2) for y in range(rows)], dim=1)
        found.append(_in_one_pass(model, whole, blocks))
    return torch.cat(found)


def _in_one_pass(
    model: DeepStackForConditionalGeneration, whole: Float[Tensor, "3 y x"], blocks: nn.ModuleList
) -> Float[Tensor, "tiles p2 d"]:
    """The tokens of one enlarged image, tile by tile."""
    visual, side = model.vision_tower.tower.visual, model.vision_tower.tower.config.patches_per_side
    patches = visual.conv1(whole[None])[0]
    down, across = patches.shape[1:]
    own = visual.positional_embedding[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None].float()
    larger = F.interpolate(own, (down, across), mode="bicubic", align_corners=False)[0].flatten(1).T.to(patches.dtype)
    positions = torch.cat([visual.positional_embedding[:1], larger])
    tokens = torch.cat([visual.class_embedding[None], patches.flatten(1).T]) + positions
    seen = _through(visual.ln_pre(tokens[None]), blocks)[0, 1:].unflatten(0, (down, across))
    places = [(y, x) for y in range(0, down, side) for x in range(0, across, side)]
    return torch.stack([seen[y : y + side, x : x + side].flatten(0, 1) for y, x in places])


def before_the_stack(
    model: DeepStackForConditionalGeneration, views: Float[Tensor, "v 3 s s"]
) -> Float[Tensor, "v p2 d"]:
    """Every view as it stands before the tower's first injection."""
    tower = model.vision_tower.tower
    hidden = _through(tower.embed(views.to(tower.dtype)), tower.blocks[: min(model.plan.at(Host.vit))])
    return hidden[:, tower.prefix :]


def projected(
    model: DeepStackForConditionalGeneration, seen: Float[Tensor, "k p2 d"], images: int
) -> Float[Tensor, "k q2 e"]:
    """View by view through its own projector; then corner by corner averaged, where the plan pools."""
    if isinstance(model.projector, TwoProjectors):
        own: list[nn.Module] = [model.projector.global_view] * images + [model.projector.tiles] * (len(seen) - images)
    else:
        own = [model.projector] * len(seen)
    tokens = torch.stack([project(view) for project, view in zip(own, seen, strict=True)])
    step, side = model.plan.pooling, model.vision_tower.tower.config.patches_per_side
    squares = tokens.unflatten(1, (side, side))
    corners = torch.stack([squares[:, i::step, j::step] for i in range(step) for j in range(step)])
    return corners.mean(0).flatten(1, 2)


def _through(hidden: Tensor, blocks: nn.ModuleList) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden
