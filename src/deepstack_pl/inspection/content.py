"""What each injection must add, found the slow way: tiles cut by hand, their tokens laid on a mosaic, and slices of it.

Nothing here reads an index table of the batch or the dealing that made it, so that a group in another's place, or a
token in another's, cannot agree with itself. Axes: ``v`` views, ``p2`` patches of a view, ``d`` width.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.inspection.probe import IMAGES, probe_images
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Dealing, Host
from deepstack_pl.stacking.injection import InjectionTrace
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig

_CLOSE = 1e-4  # of a token's size: rounding in float32 stays far below, another patch's token far above


def dealt_groups(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch
) -> dict[Host, list[list[Float[Tensor, "p2 d"]]]]:
    """For each host that receives, image by image, the groups dealt from that image of the probe."""
    plan, vision = model.plan, model.vision_tower.tower.config
    views, grid = _views(plan, vision)
    views = views.to(batch.views.device)
    tiles = grid[0] * grid[1]
    found: dict[Host, list[list[Tensor]]] = {}
    with torch.no_grad():
        for host in Host:
            if not plan.groups(host):
                continue
            tokens = _tower_tokens(model, views) if host is Host.vit else _llm_tokens(model, views, batch.vit_rows)
            found[host] = [_deal(each, grid, plan.dealing) for each in tokens[IMAGES:].split(tiles)]
    return found


def misdealt(
    trace: InjectionTrace, owner: Int[Tensor, "..."], planned: list[Float[Tensor, "p2 d"]], scale: Tensor | None
) -> str:
    """What is wrong with the tokens that ``trace`` added, where image by image ``planned``, times the gate, belongs."""
    wrong, positions = 0, 0
    for image, tokens in enumerate(planned):
        added = trace.added[owner == image]
        expected = tokens if scale is None else tokens * scale
        if added.shape != expected.shape:
            return f"image {image} takes {len(added)} positions, but its group holds {len(expected)} tokens"
        expected = expected.to(added.dtype)
        close = max(_CLOSE, torch.finfo(added.dtype).eps, torch.finfo(tokens.dtype).eps)
        apart = (added.float() - expected.float()).norm(dim=-1)
        fits = apart <= close * expected.float().norm(dim=-1)  # false for NaN too
        wrong, positions = wrong + int((~fits).sum()), positions + len(fits)
    if not wrong:
        return ""
    group = trace.injection.group
    return f"group {group} is not the one dealt from its image's tiles at {wrong} of {positions} positions"


def _views(plan: Plan, vision: VisionConfig) -> tuple[Float[Tensor, "v 3 s s"], tuple[int, int]]:
    """The probe's global views, then its tiles, image by image in raster order; and the grid of each image."""
    images, size = probe_images(plan, vision), vision.image_size
    columns, rows = images[0].width // size, images[0].height // size
    cut = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    for image in images:
        for y in range(rows):
            cut += [image.crop((x * size, y * size, (x + 1) * size, (y + 1) * size)) for x in range(columns)]
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in cut])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    return (pixels - mean) / std, (columns, rows)


def _llm_tokens(model: DeepStackForConditionalGeneration, views: Tensor, vit_rows: Tensor) -> Float[Tensor, "v p2 d"]:
    """Every view, encoded and projected; tiles receive nothing in the tower, so that gates do not matter to them."""
    return model.encode(views, vit_rows).unflatten(0, (len(views), -1))


def _tower_tokens(model: DeepStackForConditionalGeneration, views: Tensor) -> Float[Tensor, "v p2 d"]:
    """Every view as it stands before the tower's first injection."""
    tower = model.vision_tower.tower
    hidden = tower.embed(views.to(tower.dtype))
    for layer in range(min(model.plan.at(Host.vit))):
        hidden = tower.blocks[layer](hidden)
    return hidden[:, tower.prefix :]


def _deal(tiles: Float[Tensor, "tiles p2 d"], grid: tuple[int, int], dealing: Dealing) -> list[Float[Tensor, "p2 d"]]:
    """One image's tiles as its groups."""
    columns, rows = grid
    side = round(tiles.shape[1] ** 0.5)
    squares = tiles.unflatten(1, (side, side))
    mosaic = torch.cat([torch.cat(list(squares[y * columns : (y + 1) * columns]), dim=1) for y in range(rows)])
    match dealing:
        case Dealing.strided_2d:
            return [mosaic[i::rows, j::columns].flatten(0, 1) for i in range(rows) for j in range(columns)]
        case Dealing.strided_1d:
            return [mosaic.flatten(0, 1)[k :: rows * columns] for k in range(rows * columns)]
        case Dealing.tiles:
            return list(tiles)
