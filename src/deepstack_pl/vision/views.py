"""An image becomes views: the global view, then the tiles of the enlarged image in raster order (method A.1).

Both are plain stretches with Pillow's bicubic filter, so that global view and mosaic share one coordinate system
(the paper's "consistent" setting, table 5). Pillow 13 changes bicubic pixels; the project pins 12.
"""

from math import isqrt

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from deepstack_pl.stacking.mosaic import best_grid
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig


def views_of(
    image: Image.Image, plan: Plan, vision: VisionConfig
) -> tuple[Float[Tensor, "v 3 s s"], tuple[int, int] | None]:
    """The views of ``image``, normalised, and the grid ``(columns, rows)`` of its tiles (None: no tiles)."""
    image = as_rgb(image)
    size = vision.image_size
    views = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))]
    grid = None
    if plan.tiles:
        grid = best_grid(*image.size, tile=size, tiles=plan.tiles, rule=plan.grid)
        columns, rows = grid
        enlarged = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
        views += [
            enlarged[y * size : (y + 1) * size, x * size : (x + 1) * size] for y in range(rows) for x in range(columns)
        ]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    return (pixels - _channels(vision.mean)) / _channels(vision.std), grid


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
