"""An image becomes views: the global view, the tiles of the enlarged image, and their details (method A.1, A.7).

All are plain stretches with Pillow's bicubic filter, so that global view and mosaic share one coordinate system (the
paper's "consistent" setting, table 5), unless the plan letter-boxes the enlarged image. Pillow 13 changes bicubic
pixels; the project pins 12.
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
from deepstack_pl.vision.config import VisionConfig

Pixels = UInt8[ndarray, "s s 3"]


def views_of(
    image: Image.Image, plan: Plan, vision: VisionConfig
) -> tuple[Float[Tensor, "v 3 s s"], tuple[int, int] | None]:
    """The views of ``image``, normalised, and the grid ``(columns, rows)`` of its tiles (None: no tiles).

    They stand in the order that `stacking.mosaic` counts them in.
    """
    image = as_rgb(image)
    size = vision.image_size
    grid = best_grid(*image.size, tile=size, tiles=plan.tiles, rule=plan.grid) if plan.tiles else None
    views = _cut(image, (1, 1), size, Resize.stretch)
    if grid is not None:
        views += _cut(image, grid, size, plan.resize)
    if plan.detail > 1:
        for columns, rows in [(1, 1)] + ([grid] if grid is not None else []):
            fine = (columns * plan.detail, rows * plan.detail)
            views += _by_cell(_cut(image, fine, size, Resize.stretch), fine[0], plan.detail)
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    return (pixels - _channels(vision.mean)) / _channels(vision.std), grid


def _cut(image: Image.Image, grid: tuple[int, int], size: int, resize: Resize) -> list[Pixels]:
    """``image`` enlarged to ``grid`` and cut into cells of ``size`` pixels, in raster order."""
    columns, rows = grid
    full = (columns * size, rows * size)
    letterbox = resize is Resize.letterbox
    pixels = np.asarray(_letterbox(image, full) if letterbox else image.resize(full, Image.Resampling.BICUBIC))
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


def _letterbox(image: Image.Image, full: tuple[int, int]) -> Image.Image:
    """As large as fits into ``full`` in its own shape, centred on black, as LLaVA does it."""
    across, down = full[0] / image.width, full[1] / image.height
    if across < down:
        inner = (full[0], min(ceil(image.height * across), full[1]))
    else:
        inner = (min(ceil(image.width * down), full[0]), full[1])
    canvas = Image.new("RGB", full)
    corner = ((full[0] - inner[0]) // 2, (full[1] - inner[1]) // 2)
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
    return canvas


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: transparency on white, 16 bits brought down to 8 (Pillow alone would clip them)."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def no_views(vision: VisionConfig) -> Float[Tensor, "0 3 s s"]:
    """The views of a sample without an image."""
    return torch.empty(0, 3, vision.image_size, vision.image_size)


def full_grid_size(plan: Plan, vision: VisionConfig) -> tuple[int, int]:
    """Width and height of an image that is cut into as many tiles as ``plan`` allows: the worst case."""
    size = vision.image_size
    if not plan.tiles:
        return size, size
    side = isqrt(plan.most_tiles)
    columns, rows = (side, side) if side * side == plan.most_tiles else (plan.most_tiles, 1)
    return columns * size, rows * size


def _channels(values: list[float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values)[:, None, None]
