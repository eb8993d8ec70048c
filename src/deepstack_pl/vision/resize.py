"""Enlarging and shrinking pictures, behind one face: Pillow's bicubic filter, or torch's on uint8.

Both are antialiased and work in integers. Torch's is several times as fast where the processor has AVX2, and slower
where it has not. Pillow 13 changes bicubic pixels; the project pins 12.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from deepstack_pl.vision.config import ViewsBackend

Resizer: TypeAlias = Callable[[int, int], UInt8[ndarray, "y x 3"]]


def resizer(image: Image.Image, backend: ViewsBackend) -> Resizer:
    """A function of width and height, in pixels, that stretches ``image`` (RGB) to them."""
    return _by_pillow(image) if backend is ViewsBackend.pil else _by_torch(image)


def _by_pillow(image: Image.Image) -> Resizer:
    def stretch(width: int, height: int) -> UInt8[ndarray, "y x 3"]:
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

    return stretch


def _by_torch(image: Image.Image) -> Resizer:
    # A copy, because torch warns of read-only memory; channels last, because only then is the fast kernel taken.
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)

    def stretch(width: int, height: int) -> UInt8[ndarray, "y x 3"]:
        large = pixels
        if image.height > 100 * image.width and height < image.height:  # Pillow takes such from top to bottom first
            large = _bicubic(large, image.width, height)
        return _bicubic(large, width, height)[0].permute(1, 2, 0).numpy()

    return stretch


def _bicubic(pixels: UInt8[Tensor, "1 3 h w"], width: int, height: int) -> UInt8[Tensor, "1 3 y x"]:
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
