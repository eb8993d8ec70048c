"""Boards of views as SVG: the pixels once, the groups laid over them in colour and with their signs."""

import base64
import html
from io import BytesIO

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from PIL import Image

from deepstack_pl.inspection.anatomy import Board
from deepstack_pl.inspection.plots import colour
from deepstack_pl.inspection.sample_words import symbol
from deepstack_pl.stacking.config import Dealt

_AREA, _NARROW, _WIDE, _HIGH = 410 * 410, 120, 1060, 640  # of a board on the page, CSS pixels
_LOUPE, _GLASS = 8, 220  # tokens a side under the magnifying glass, and its width on the page
_SIGN, _SIGNS_FROM = 12, 9  # CSS pixels: a sign's size at most, and how wide a token must be for it to be legible

_Box = tuple[float, float, float, float]  # left, top, width, height, in pixels of the board


def png_uri(pixels: UInt8[NDArray, "h w 3"]) -> str:
    """The pixels, exactly, as something that a page can hold."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def board_figures(board: Board, name: str, caption: str) -> list[str]:
    """The board as the tower sees it; where groups take from it, also with these, and the middle of that enlarged.

    ``name`` is unique on the page; ``caption`` is text.
    """
    height, width = board.pixels.shape[:2]
    across = _across(width, height)
    image = (
        f'<image id="{name}" href="{png_uri(board.pixels)}" width="{width}" height="{height}" '
        'style="image-rendering:pixelated"/>'
    )
    seen = _svg(image + _frames(board) + _names(board, across), (0, 0, width, height), across, f"{caption}, as seen")
    figures = [_figure(seen, across, caption)]
    if not board.groups:
        return figures
    box, part = (0.0, 0.0, float(width), float(height)), _middle(board)
    legible = min(across / mask.shape[1] for mask in board.groups.values()) >= _SIGNS_FROM
    tints = "".join(_tint(board, dealt, mask) for dealt, mask in board.groups.items())
    layer = f'<use href="#{name}"/><g id="{name}-groups">{tints}</g>{_frames(board)}'
    layer += _all_signs(board, box, across) if legible else ""
    figures.append(_figure(_svg(layer, box, across, f"{caption}, groups"), across, "each token's group"))
    if not legible:
        again = f'<use href="#{name}"/><use href="#{name}-groups"/>{_frames(board)}{_all_signs(board, part, _GLASS)}'
        enlarged = _svg(again, part, _GLASS, f"{caption}, groups, enlarged")
        figures.append(_figure(enlarged, _GLASS, "the same, enlarged where views meet"))
    return figures


def _figure(svg: str, width: float, caption: str) -> str:
    return f'<figure style="width:{width:.0f}px">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _svg(inner: str, box: _Box, width: float, label: str) -> str:
    view = " ".join(f"{value:g}" for value in box)
    height = width * box[3] / box[2]
    return (
        f'<svg viewBox="{view}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{html.escape(label)}">{inner}</svg>'
    )


def _across(width: int, height: int) -> float:
    """How wide it is shown: about as large as any other, whatever its shape."""
    ratio = width / height
    return min(max((_AREA * ratio) ** 0.5, _NARROW), _WIDE, _HIGH * ratio)


def _frames(board: Board) -> str:
    """A line between views, a strong one between tiles."""
    height, width = board.pixels.shape[:2]
    lines = []
    for count, along in ((board.grid[0], True), (board.grid[1], False)):
        for number in range(1, count):
            strong = number % board.block == 0
            at = number * (width if along else height) / count
            place = f"M{at:g} 0V{height}" if along else f"M0 {at:g}H{width}"
            lines.append(f'<path class="{"tile" if strong else "detail"}" d="{place}"/>')
    return "".join(lines)


def _names(board: Board, across: float) -> str:
    """Each tile's number, in raster order; a single view needs none."""
    height, width = board.pixels.shape[:2]
    columns, rows = board.grid[0] // board.block, board.grid[1] // board.block
    if columns * rows < 2:
        return ""
    size = 13 * width / across
    texts = []
    for number in range(columns * rows):
        x, y = number % columns * width / columns, number // columns * height / rows
        texts.append(f'<text class="name" x="{x + size / 2:g}" y="{y + 1.3 * size:g}">tile {number}</text>')
    return f'<g style="font-size:{size:g}px">{"".join(texts)}</g>'


def _tint(board: Board, dealt: Dealt, mask: Bool[NDArray, "y x"]) -> str:
    """A group's colour over its tokens."""
    cell = board.pixels.shape[1] / mask.shape[1]
    tokens = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(mask).tolist())
    return f'<path transform="scale({cell:g})" d="{tokens}" style="fill:{colour(dealt)};fill-opacity:.45"/>'


def _all_signs(board: Board, box: _Box, across: float) -> str:
    """Each token's sign, as far as it lies within ``box``, shown ``across`` CSS pixels wide."""
    return "".join(_signs(board, symbol(dealt), mask, box, across) for dealt, mask in board.groups.items())


def _signs(board: Board, sign: str, mask: Bool[NDArray, "y x"], box: _Box, across: float) -> str:
    cell = board.pixels.shape[1] / mask.shape[1]
    left, top, right, bottom = (round(edge / cell) for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    size = min(6.5, 10 * _SIGN * box[2] / cell / across)  # in tenths of a token
    rows = []
    for y in range(top, bottom):
        places = [x for x in range(left, right) if mask[y, x]]
        xs = " ".join(f"{10 * x + 5}" for x in places)
        rows += [f'<text x="{xs}" y="{10 * y + 5 + 0.36 * size:g}">{sign * len(places)}</text>'] if places else []
    return f'<g class="signs" style="font-size:{size:.2f}px" transform="scale({cell / 10:g})">{"".join(rows)}</g>'


def _middle(board: Board) -> _Box:
    """A square of tokens around the first corner at which views meet, or at the top left."""
    height, width = board.pixels.shape[:2]
    cell = width / max(mask.shape[1] for mask in board.groups.values())
    side = _LOUPE * cell
    corner = (width / board.grid[0] - side / 2, height / board.grid[1] - side / 2)
    x, y = (max(0.0, min(at, whole - side)) for at, whole in zip(corner, (width, height), strict=True))
    return x, y, side, side
