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
from deepstack_pl.inspection.probe import IMAGES, full_grid, probe_images, views_by_source
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Dealing, Host, Newline, Order, Sequence, Source
from deepstack_pl.stacking.injection import InjectionTrace
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig

VIEWS = {Source.tiles: "tiles", Source.global_view: "global view", Source.detail: "details"}
_CLOSE = 1e-4  # of a token's size: rounding in float32 stays far below, another patch's token far above


def dealt_groups(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch
) -> dict[tuple[Host, Source, int], list[Float[Tensor, "n d"]]]:
    """For each host and each group that it takes, image by image of the probe, what is added over the group's slots."""
    plan, vision = model.plan, model.vision_tower.tower.config
    views = _views(plan, vision).to(batch.views.device)
    places = views_by_source(plan, vision)
    found: dict[tuple[Host, Source, int], list[Tensor]] = {}
    with torch.no_grad():
        for host in {injection.host for injection in plan.injections}:
            tokens = _tower_tokens(model, views) if host is Host.vit else _llm_tokens(model, views, batch.vit_rows)
            for source, group in plan.groups(host):
                found[host, source, group] = [
                    _planned(model, source, group, [tokens[places[of][image]] for of in Source])
                    for image in range(IMAGES)
                ]
    return found


def _planned(
    model: DeepStackForConditionalGeneration, source: Source, group: int, own: list[Float[Tensor, "v p2 d"]]
) -> Float[Tensor, "n d"]:
    """What ``group`` of one image adds; ``own`` are the image's tiles, global view and details."""
    plan, grid = model.plan, full_grid(model.plan, model.vision_tower.tower.config)
    tiles, small, details = own
    match source:
        case Source.global_view:
            return small[0]
        case Source.tiles:
            return _deal(tiles, grid, plan.dealing)[group]
        case Source.detail:
            fine = (plan.detail, plan.detail)
            of_views = [_deal(each, fine, plan.dealing)[group] for each in details.split(plan.detail**2)]
            return _laid_out(model, torch.stack(of_views), grid)


def _laid_out(
    model: DeepStackForConditionalGeneration, views: Float[Tensor, "v p2 d"], grid: tuple[int, int]
) -> Float[Tensor, "n d"]:
    """The tokens of a global view and its tiles as they follow each other in the text sequence."""
    plan, tiles = model.plan, views[1:]
    if plan.sequence is Sequence.global_view:
        return views[0]
    if plan.order is Order.by_group:
        return torch.cat([views[0], *_deal(tiles, grid, plan.dealing)])
    rows = _mosaic(tiles, grid)
    if plan.newline is Newline.rows_and_groups:
        assert model.image_newline is not None
        rows = torch.cat([rows, model.image_newline.to(rows.dtype).expand(len(rows), 1, -1)], dim=1)
    return torch.cat([views[0], rows.flatten(0, 1)])


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
    what, views = trace.injection.what, VIEWS[trace.injection.source]
    return f"{what} is not the one dealt from its image's {views} at {wrong} of {positions} positions"


def _views(plan: Plan, vision: VisionConfig) -> Float[Tensor, "v 3 s s"]:
    """The probe's global views; then, image by image, its tiles and the details of each view, in raster order."""
    images, size, (columns, rows) = probe_images(plan, vision), vision.image_size, full_grid(plan, vision)
    cut = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    fine = plan.detail if plan.detail > 1 else 0
    for image in images:
        cut += _cells(image, (columns, rows), size, (0, 0, columns, rows))
        cut += _cells(image, (fine, fine), size, (0, 0, fine, fine))
        for y in range(rows):
            for x in range(columns):
                box = (x * fine, y * fine, (x + 1) * fine, (y + 1) * fine)
                cut += _cells(image, (columns * fine, rows * fine), size, box)
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in cut])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    return (pixels - mean) / std


def _cells(image: Image.Image, grid: tuple[int, int], size: int, box: tuple[int, int, int, int]) -> list[Image.Image]:
    """The cells of ``box`` (left, top, right, bottom, in cells) of ``image`` enlarged to ``grid``."""
    left, top, right, bottom = box
    if left == right:
        return []
    large = image.resize((grid[0] * size, grid[1] * size), Image.Resampling.BICUBIC)
    return [
        large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(top, bottom)
        for x in range(left, right)
    ]


def _llm_tokens(model: DeepStackForConditionalGeneration, views: Tensor, vit_rows: Tensor) -> Float[Tensor, "v p2 d"]:
    """The views that reach the LLM, encoded and projected. Of what the tower adds to global views its gates are closed
    or open as the model's own are; tiles and details receive nothing there.
    """
    per_view = (model.vision_tower.tower.config.patches_per_side // model.plan.pooling) ** 2
    return model.encode(views, vit_rows).unflatten(0, (-1, per_view))


def _tower_tokens(model: DeepStackForConditionalGeneration, views: Tensor) -> Float[Tensor, "v p2 d"]:
    """Every view as it stands before the tower's first injection."""
    tower = model.vision_tower.tower
    hidden = tower.embed(views.to(tower.dtype))
    for layer in range(min(model.plan.at(Host.vit))):
        hidden = tower.blocks[layer](hidden)
    return hidden[:, tower.prefix :]


def _mosaic(tiles: Float[Tensor, "tiles p2 d"], grid: tuple[int, int]) -> Float[Tensor, "y x d"]:
    """Tiles laid on one grid."""
    columns, rows = grid
    side = round(tiles.shape[1] ** 0.5)
    squares = tiles.unflatten(1, (side, side))
    return torch.cat([torch.cat(list(squares[y * columns : (y + 1) * columns]), dim=1) for y in range(rows)])


def _deal(tiles: Float[Tensor, "tiles p2 d"], grid: tuple[int, int], dealing: Dealing) -> list[Float[Tensor, "p2 d"]]:
    """One image's tiles as its groups."""
    columns, rows = grid
    match dealing:
        case Dealing.strided_2d:
            mosaic = _mosaic(tiles, grid)
            return [mosaic[i::rows, j::columns].flatten(0, 1) for i in range(rows) for j in range(columns)]
        case Dealing.strided_1d:
            return [_mosaic(tiles, grid).flatten(0, 1)[k :: rows * columns] for k in range(rows * columns)]
        case Dealing.tiles:
            return list(tiles)
