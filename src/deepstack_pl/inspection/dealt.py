"""Which token of an enlarged image enters before which layer, drawn on the image as it is cut into tiles."""

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray
from PIL import Image

from deepstack_pl.inspection.plots import INK, PALE, colour
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Source
from deepstack_pl.stacking.mosaic import best_grid, deal
from deepstack_pl.vision.views import views_of


def dealt_figure(page: Image.Image, processor: DeepStackProcessor) -> Figure | None:
    """The tiles as the model sees them, laid on their grid: plain, and with each token in the colour of its group. None
    where no group is dealt from tiles.
    """
    plan, vision = processor.plan, processor.vision
    groups = {i.group: [] for i in plan.injections if i.source is Source.tiles}
    for injection in plan.injections:
        if injection.source is Source.tiles:
            groups[injection.group].append(f"{injection.host.value} layer {injection.layer}")
    if not groups:
        return None
    grid = best_grid(*page.size, tile=vision.image_size, tiles=plan.tiles, rule=plan.grid)
    pixels = _mosaic(page, processor, grid)
    side = vision.patches_per_side // plan.pooling
    token = vision.image_size / side
    figure = Figure(figsize=(9, 1.0 + 4.0 * pixels.shape[0] / pixels.shape[1]), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set_title(f"{grid[0]} x {grid[1]} tiles, {pixels.shape[1]} x {pixels.shape[0]}", fontsize=9, color=PALE)
    right.set_title("each token in the colour of its group", fontsize=9, color=PALE)
    for axes in (left, right):
        axes.imshow(pixels, interpolation="nearest")
        axes.axis("off")
        for column in range(grid[0]):
            for row in range(grid[1]):
                corner = (column * vision.image_size - 0.5, row * vision.image_size - 0.5)
                edge = {"fill": False, "edgecolor": INK, "linewidth": 1.5}
                axes.add_patch(Rectangle(corner, vision.image_size, vision.image_size, **edge))
    for group, tokens in enumerate(deal(grid, side, plan.dealing).tolist()):
        for number in tokens if group in groups else ():
            tile, patch = divmod(number, side * side)
            x = (tile % grid[0]) * side + patch % side
            y = (tile // grid[0]) * side + patch // side
            look = {"facecolor": colour((Source.tiles, group)), "alpha": 0.55, "linewidth": 0}
            right.add_patch(Rectangle((x * token - 0.5, y * token - 0.5), token, token, **look))
    handles = [
        Patch(color=colour((Source.tiles, group)), label=f"group {group}: {', '.join(places)}")
        for group, places in sorted(groups.items())
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _mosaic(page: Image.Image, processor: DeepStackProcessor, grid: tuple[int, int]) -> UInt8[ndarray, "y x 3"]:
    """The tiles that the model is given, on their grid."""
    views, _ = views_of(page, processor.plan, processor.vision, processor.backend)
    tiles = views[1 : 1 + grid[0] * grid[1]].permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(tiles[y * grid[0] : (y + 1) * grid[0]]), axis=1) for y in range(grid[1])]
    return np.concatenate(rows)
