"""An image becomes views: the global view, the tiles of the enlarged image, and their details (method A.1, A.7).

All are plain stretches with a bicubic filter, so that global view and mosaic share one coordinate system (the paper's
"consistent" setting, table 5), unless the plan letter-boxes the enlarged image. Views stay uint8 until they are on the
model's device: a quarter of the memory and of the traffic on the way there.
"""

from math import ceil, isqrt

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from deepstack_pl.stacking.config import Resize
from deepstack_pl.stacking.mosaic import best_grid
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.resize import Resizer, resizer

Pixels = UInt8[ndarray, "s s 3"]


def views_of(
    image: Image.Image, plan: Plan, vision: VisionConfig, backend: ViewsBackend = ViewsBackend.pil
) -> tuple[UInt8[Tensor, "v 3 s s"], tuple[int, int] | None]:
    """The views of ``image``, levels 0 to 255, and the grid ``(columns, rows)`` of its tiles (None: no tiles).

    They stand in the order that `stacking.mosaic` counts them in.
    """
    stretch = resizer(as_rgb(image), backend)
    size = vision.image_size
    grid = best_grid(*image.size, tile=size, tiles=plan.tiles, rule=plan.grid) if plan.tiles else None
    views = _cut(stretch, (1, 1), size)
    if grid is not None:
        views += _cut(_enlarger(stretch, plan.resize, image.size), grid, size)
    if plan.detail > 1:
        for columns, rows in [(1, 1)] + ([grid] if grid is not None else []):
            fine = (columns * plan.detail, rows * plan.detail)
            views += _by_cell(_cut(stretch, fine, size), fine[0], plan.detail)
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous(), grid  # one layout in every batch


def normalise(
    views: UInt8[Tensor, "v 3 s s"] | Float[Tensor, "v 3 s s"], vision: VisionConfig
) -> Float[Tensor, "v 3 s s"]:
    """Levels 0 to 255 as the tower was trained on them: by 255, less ``vision.mean``, by ``vision.std``, in float32.

    Float views are taken as normalised already, and returned as they are.
    """
    if views.dtype != torch.uint8:
        return views
    # Tensors, because a GPU divides by a number as it multiplies with its reciprocal, which changes the last bit; made
    # on the device, because every step would wait for a copy to it.
    levels, mean, std = (_channels(values, views.device) for values in ([255.0] * 3, vision.mean, vision.std))
    return (views.float() / levels - mean) / std


def _cut(stretch: Resizer, grid: tuple[int, int], size: int) -> list[Pixels]:
    """The picture enlarged to ``grid`` and cut into cells of ``size`` pixels, in raster order."""
    columns, rows = grid
    pixels = stretch(columns * size, rows * size)
    return [pixels[y * size : (y + 1) * size, x * size : (x + 1) * size] for y in range(rows) for x in range(columns)]


def _by_cell(fine: list[Pixels], columns: int, detail: int) -> list[Pixels]:
    """Cells of a finer lattice, raster order, as those of each coarse cell together."""
    rows = len(fine) // columns
    return [
        fine[(y + i) * columns + x + j]
        for y in range(0, rows, detail)
        for x in range(0, columns, detail)
        for i in range(detail)
        for j in range(detail)
    ]


def _enlarger(stretch: Resizer, resize: Resize, own: tuple[int, int]) -> Resizer:
    """What ``resize`` makes of a picture of its ``own`` width and height: stretched, or as large as fits, in its own
    shape and centred on black, as LLaVA does it.
    """
    if resize is Resize.stretch:
        return stretch

    def boxed(width: int, height: int) -> UInt8[ndarray, "y x 3"]:
        across, down = width / own[0], height / own[1]
        if across < down:
            inner = (width, min(ceil(own[1] * across), height))
        else:
            inner = (min(ceil(own[0] * down), width), height)
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[top : top + inner[1], left : left + inner[0]] = stretch(*inner)
        return canvas

    return boxed


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: transparency on white, 16 bits brought down to 8 (Pillow alone would clip them).

    An image that is so already is returned itself, not a copy.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def no_views(vision: VisionConfig) -> UInt8[Tensor, "0 3 s s"]:
    """The views of a sample without an image."""
    return torch.empty(0, 3, vision.image_size, vision.image_size, dtype=torch.uint8)


def full_grid_size(plan: Plan, vision: VisionConfig) -> tuple[int, int]:
    """Width and height of an image that is cut into as many tiles as ``plan`` allows: the worst case."""
    size = vision.image_size
    if not plan.tiles:
        return size, size
    side = isqrt(plan.most_tiles)
    columns, rows = (side, side) if side * side == plan.most_tiles else (plan.most_tiles, 1)
    return columns * size, rows * size


def _channels(values: list[float], device: torch.device) -> Float[Tensor, "3 1 1"]:
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])
