"""Renders the pages of the fine print set: woven swatches whose weave a small view of the page cannot hold.

A page is seen twice: shrunk to ``view`` pixels a side (the global view) and to twice that (the enlarged image). Threads
are as wide as one pixel of the enlarged image, so a weave is a pattern at that image's Nyquist frequency, which is
exactly the sampling frequency of the global view: there it averages out. Exactly, and not only about: the profile of
the threads is projected onto the null space of the resize itself. The page is drawn at three times the enlarged size,
for a person to look at, and everything but the weave is the same whatever the weave.

Axes: ``y x`` page pixels, ``k`` cells a side, ``c`` page pixels a cell, ``w`` weaves, ``s`` pixels of a view.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from numpy import ndarray
from PIL import Image

from deepstack_pl.data.config import FinePrintConfig

# Dyes leave room for threads 69 levels lighter and darker, cloth and grain on top: a clipped thread would be visible
# in the global view.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (171, 84, 85),
    "orange": (171, 120, 84),
    "yellow": (171, 165, 85),
    "green": (87, 141, 92),
    "teal": (84, 161, 166),
    "blue": (84, 102, 171),
    "purple": (136, 84, 162),
    "pink": (171, 128, 154),
}
WEAVES = ("plain", "rows", "columns", "check")
PAPER = (234, 225, 204)

PAGE_PIXELS = 3  # page pixels a pixel of the enlarged image
JITTER = 5  # dye lots differ by as many levels, either way
FIBRE = 6  # length of a fibre of the paper, page pixels
HEADROOM = min(min(min(rgb), 255 - max(rgb)) for rgb in COLOURS.values()) - JITTER


@dataclass(frozen=True, slots=True)
class Page:
    """One page and what is on it, as indices into `COLOURS` and `WEAVES`."""

    pixels: UInt8[ndarray, "y x 3"]
    colours: Int[ndarray, "k k"]
    weaves: Int[ndarray, "k k"]


class Loom:
    """Draws pages of one difficulty; what all of them share is worked out once."""

    def __init__(self, config: FinePrintConfig) -> None:
        self.config = config
        self.size = PAGE_PIXELS * 2 * config.view_size
        self.cell = self.size // config.cells
        self._mask, self._shade = self._furniture()
        self.patterns = self._patterns()
        self._paper = np.asarray(PAPER, np.float32)
        self._dyes = np.asarray(list(COLOURS.values()), np.float32)

    def page(self, rng: np.random.Generator) -> Page:
        """Draw the facts, then the page."""
        k = self.config.cells
        colours = rng.integers(len(COLOURS), size=(k, k))
        weaves = rng.integers(self.config.weaves, size=(k, k))
        polarity = np.where(rng.random((k, k)) < self.config.flips, -1, 1)
        return Page(self.render(colours, weaves, polarity, rng), colours, weaves)

    def render(
        self,
        colours: Int[ndarray, "k k"],
        weaves: Int[ndarray, "k k"],
        polarity: Int[ndarray, "k k"],
        rng: np.random.Generator,
    ) -> UInt8[ndarray, "y x 3"]:
        """The page that holds these facts; ``rng`` gives dye lots and grain alone."""
        lots = rng.uniform(-JITTER, JITTER, size=(*colours.shape, 3)).astype(np.float32)
        dyes = self._dyes[colours] + lots - self._paper
        threads = self.patterns[weaves] * polarity[..., None, None].astype(np.float32)
        page = threads.transpose(0, 2, 1, 3).reshape(self.size, self.size) + self._shade
        page += self._grain(rng)
        spread = dyes.repeat(self.cell, axis=0).repeat(self.cell, axis=1)
        spread *= self._mask[..., None]
        spread += page[..., None]
        spread += self._paper + 0.5
        return np.clip(spread, 0, 255, out=spread).astype(np.uint8)

    def _grain(self, rng: np.random.Generator) -> Float32[ndarray, "y x"]:
        """Fibres that lie along the rows, each row's shifted, with the standard deviation that the config asks for.

        Besides looking like paper they dither: rounding to 8 bits, on the page and between the two passes of Pillow's
        resize, would otherwise leave a trace of the weave a fifteenth of a level deep, which a linear probe finds.
        """
        fibres = rng.standard_normal((self.size, self.size // FIBRE + 1), np.float32) * np.float32(self.config.noise)
        fibres = fibres.repeat(FIBRE, axis=1).reshape(-1)
        starts = np.arange(self.size) * (self.size + FIBRE) + rng.integers(FIBRE, size=self.size)
        return fibres[starts[:, None] + np.arange(self.size)]

    def _patterns(self) -> Float32[ndarray, "w c c"]:
        """One cell of every weave, its deepest thread ``contrast`` levels from the swatch's colour."""
        window = _window(self.cell)
        threads = self._threads(window)
        rows = np.outer(threads, window)
        woven = [pattern / np.abs(pattern).max() for pattern in (rows, rows.T, np.outer(threads, threads))]
        assert self.config.contrast + 9 <= HEADROOM, f"dyes leave {HEADROOM} levels for threads, cloth and grain"
        return np.stack([np.zeros_like(rows), *woven]).astype(np.float32) * np.float32(self.config.contrast)

    def _threads(self, window: Float[ndarray, " c"]) -> Float[ndarray, " c"]:
        """Light and dark threads in turn, fading out with ``window``, that the global view cannot see.

        A profile under the window for which every pixel of every cell of the global view stays as it is. Projecting
        and clipping in turn finds one that is hardly deeper than the threads it began with.
        """
        shrink = resize_matrix(self.size, self.config.view_size)
        columns = np.split(shrink, self.config.cells, axis=1)  # cells at the page's edge are resized differently
        seen = np.concatenate(columns) * window
        unseen = np.eye(self.cell) - np.linalg.pinv(seen, rcond=1e-6) @ seen
        at = np.arange(self.cell) + 0.5
        threads = np.tanh(3 * np.cos(np.pi * (at - PAGE_PIXELS / 2) / PAGE_PIXELS))
        for _ in range(100):
            threads = unseen @ np.clip(threads, -1, 1)
        return window * threads

    def _furniture(self) -> tuple[Float32[ndarray, "y x"], Float32[ndarray, "y x"]]:
        """What every page has: where its swatches lie, and light, seams, stitches and laid paper in levels."""
        inset, scale = self.cell / 16, self.cell / 64
        at = np.arange(self.cell) + 0.5
        x, y = np.meshgrid(at, at)
        edge = _rounded(x, y, self.cell, inset, radius=7 * scale)
        mask = np.clip(0.5 - edge, 0, 1)
        shadow = np.clip(1 - _rounded(x - 1.5 * scale, y - 2.5 * scale, self.cell, inset, 7 * scale) / 4, 0, 1)
        shade = -34 * shadow * (1 - mask)
        shade -= 30 * np.clip(1 - np.abs(edge + 0.5), 0, 1)  # the seam
        slope = (self.cell - x - y) / self.cell
        shade += 26 * slope * np.clip(1 - np.abs(edge + 2.2 * scale) / (1.6 * scale), 0, 1)  # the turned edge
        along = np.where(np.abs(x - self.cell / 2) > np.abs(y - self.cell / 2), y, x)
        dash = np.mod(along - self.cell / 2, 6 * scale) < 3.6 * scale
        shade += 34 * dash * np.clip(1.4 - np.abs(edge + 5 * scale), 0, 1)  # the stitches
        shade += 3 * mask * np.where((x + y) // 1 % 4 < 2, 1, -1)  # the ground of the cloth
        shade -= 5 * (1 - mask) * (y % 4 < 1)  # laid paper
        mask, shade = (np.tile(part, (self.config.cells,) * 2).astype(np.float32) for part in (mask, shade))
        for border in (shade[0], shade[-1], shade[:, 0], shade[:, -1]):
            border -= 90
        return mask, shade


def resize_matrix(source: int, target: int) -> Float[ndarray, "target source"]:
    """Pillow's bicubic resize of one axis, as the linear map that it is."""
    identity = Image.fromarray(np.eye(source, dtype=np.float32))
    return np.asarray(identity.resize((source, target), Image.Resampling.BICUBIC), np.float64)


def _window(cell: int) -> Float[ndarray, " c"]:
    """One in the middle of a cell, falling to nothing inside the swatch's seam."""
    at = np.arange(cell) + 0.5
    rise = np.clip((np.minimum(at, cell - at) - cell / 16) / (cell / 8), 0, 1)
    return 0.5 - 0.5 * np.cos(np.pi * rise)


def _rounded(
    x: Float[ndarray, "c c"], y: Float[ndarray, "c c"], cell: int, inset: float, radius: float
) -> Float[ndarray, "c c"]:
    """Signed distance to a rounded square in the middle of a cell, negative inside."""
    dx, dy = (np.abs(at - cell / 2) - (cell / 2 - inset - radius) for at in (x, y))
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - radius
