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
from deepstack_pl.multimodal.projector import PatchMerger, PixelShuffle, TwoProjectors
from deepstack_pl.stacking.config import Dealt, Encoding, Host, Resize, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.resize import resizer
from deepstack_pl.vision.towers_face import Tower


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
        return model.vision_tower(views, vit_rows, model._scales(Host.vit))[0]
    blocks, (columns, rows), images = model.plan.vit_layers, pictures.grid, len(pictures.images)
    found, tiles = [_through(tower, tower.embed(views[:images]), blocks)[:, tower.prefix :]], columns * rows
    for image in range(images):
        cut = views[images + image * tiles : images + (image + 1) * tiles]
        whole = torch.cat([torch.cat(list(cut[y * columns : (y + 1) * columns]), dim=2) for y in range(rows)], dim=1)
        found.append(_in_one_pass(model, whole, blocks))
    return torch.cat(found)


def _in_one_pass(
    model: DeepStackForConditionalGeneration, whole: Float[Tensor, "3 y x"], blocks: int
) -> Float[Tensor, "tiles p2 d"]:
    """The tokens of one enlarged image, tile by tile."""
    tower, side = model.vision_tower.tower, model.vision_tower.tower.config.patches_per_side
    patches = tower.patches(whole[None])[0]
    down, across = patches.shape[:2]
    own = tower.positions().unflatten(0, (side, side)).permute(2, 0, 1)[None].float()
    larger = F.interpolate(own, (down, across), mode="bicubic", align_corners=False)[0].flatten(1).T.to(patches.dtype)
    hidden = tower.finish((patches.flatten(0, 1) + larger)[None])
    seen = _through(tower, hidden, blocks)[0, tower.prefix :].unflatten(0, (down, across))
    places = [(y, x) for y in range(0, down, side) for x in range(0, across, side)]
    return torch.stack([seen[y : y + side, x : x + side].flatten(0, 1) for y, x in places])


def before_the_stack(
    model: DeepStackForConditionalGeneration, views: Float[Tensor, "v 3 s s"]
) -> Float[Tensor, "v p2 d"]:
    """Every view as it stands before the tower's first injection."""
    return _after(model, views, min(model.plan.at(Host.vit)))


def tapped(
    model: DeepStackForConditionalGeneration, views: Float[Tensor, "v 3 s s"], vit_rows: Tensor, number: int
) -> Float[Tensor, "k p2 d"]:
    """The hidden state that a tap reads; with injections on the way there, as the tower's own pass has it."""
    tap = model.plan.taps[number]
    if model.plan.at(Host.vit) and tap >= min(model.plan.at(Host.vit)):
        return model.vision_tower(views, vit_rows, model._scales(Host.vit))[1 + number]
    return _after(model, views, tap)


def _after(model: DeepStackForConditionalGeneration, views: Tensor, blocks: int) -> Float[Tensor, "v p2 d"]:
    """Every view by itself after so many blocks."""
    tower = model.vision_tower.tower
    return _through(tower, tower.embed(views.to(tower.dtype)), blocks)[:, tower.prefix :]


def projected(
    model: DeepStackForConditionalGeneration, seen: Float[Tensor, "k p2 d"], images: int, dealt: Dealt | None
) -> Float[Tensor, "k q2 e"]:
    """View by view through its own projector, for the text or for a group: corner by corner averaged where the plan
    pools, or side by side where the projector joins them.
    """
    step, side = model.plan.pooling, model.vision_tower.tower.config.patches_per_side
    squares = seen.unflatten(1, (side, side))
    corners = [squares[:, i::step, j::step].flatten(1, 2) for i in range(step) for j in range(step)]
    if dealt is not None and dealt[0] is Source.spatial:
        corners = [corners[dealt[1]]]
    own = {} if dealt is None else dict(model.own_projectors.items())
    project = own.get(f"{dealt[0].value}_{dealt[1]}", model.projector) if dealt else model.projector
    if isinstance(project, TwoProjectors):
        small, others = (
            _alike([c[part] for c in corners], of)
            for part, of in ((slice(None, images), project.global_view), (slice(images, None), project.tiles))
        )
        return torch.cat([small, others])
    assert project is not None
    return _alike(corners, project)


def _alike(corners: list[Float[Tensor, "k q2 d"]], project: nn.Module) -> Float[Tensor, "k q2 e"]:
    """All views through one projector, view by view."""
    if isinstance(project, PatchMerger):
        if project.norm_joined:
            wide = project.norm(torch.cat(corners, dim=-1))
        else:
            wide = torch.cat([project.norm(corner) for corner in corners], dim=-1)
        return project.linear_fc2(F.gelu(project.linear_fc1(wide)))
    if isinstance(project, PixelShuffle):
        wide = torch.cat(corners, dim=-1)
        return project[2](F.gelu(project[0](wide)))
    return torch.stack([project(corner) for corner in corners]).mean(0)


def _through(tower: Tower, hidden: Tensor, blocks: int) -> Tensor:
    for layer in range(blocks):
        hidden = tower.run(layer, hidden)
    return hidden
