"""What each injection must add, found the slow way: tiles cut by hand, their tokens laid on a mosaic, and slices of it.

Nothing here reads an index table of the batch or the dealing that made it, so that a group in another's place, or a
token in another's, cannot agree with itself. Axes: ``v`` views, ``p2`` patches of a view, ``d`` width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.inspection.probe import Pictures, views_by_source
from deepstack_pl.inspection.slow_views import before_the_stack, cut_by_hand, features, projected, tapped
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Dealing, Dealt, Host, Newline, Operator, Order, Sequence, Source, Unfilled
from deepstack_pl.stacking.injection import InjectionTrace, noise_like
from deepstack_pl.vision.config import ViewsBackend

VIEWS = {
    Source.tiles: "tiles",
    Source.global_view: "global view",
    Source.detail: "details",
    Source.tap: "views",
    Source.spatial: "views",
}
_CLOSE = 1e-4  # of a token's size: rounding in float32 stays far below, another patch's token far above


@dataclass(frozen=True, slots=True)
class Laid:
    """What the plan lays where, image by image of some pictures.

    Attributes:
        groups: for each host and each group that it takes, what is added over the group's slots.
        sequence: what stands in the text.
    """

    groups: dict[tuple[Host, Source, int], list[Float[Tensor, "n d"]]]
    sequence: list[Float[Tensor, "n d"]]


def lay_out(
    model: DeepStackForConditionalGeneration, batch: MultimodalBatch, pictures: Pictures, backend: ViewsBackend
) -> Laid:
    """Lay out ``pictures`` by hand; of ``batch``, made of them, only what the tower adds to global views is read."""
    plan, places = model.plan, views_by_source(model.plan, pictures)
    views = cut_by_hand(plan, model.vision_tower.tower.config, pictures, backend).to(batch.views.device)
    images = range(len(pictures.images))

    def own(tokens: Tensor, image: int) -> dict[Source, Tensor]:
        return {of: tokens[at[image]] for of, at in places.items() if all(place < len(tokens) for place in at[image])}

    def group(host: Host, dealt: Dealt, tokens: Tensor) -> dict[tuple[Host, Source, int], list[Tensor]]:
        return {(host, *dealt): [_group(model, *dealt, own(tokens, image), pictures.grid) for image in images]}

    with torch.no_grad():
        seen = features(model, views, batch.vit_rows, pictures)
        found: dict[tuple[Host, Source, int], list[Tensor]] = {}
        for dealt in plan.groups(Host.llm) if plan.at(Host.llm) else ():
            read = tapped(model, views, batch.vit_rows, dealt[1]) if dealt[0] is Source.tap else seen
            found |= group(Host.llm, dealt, projected(model, read, len(images), dealt))
        for dealt in plan.groups(Host.vit):
            found |= group(Host.vit, dealt, before_the_stack(model, views))
        reads_text = plan.sequence not in (Sequence.channels, Sequence.blank)
        tokens = projected(model, seen, len(images), None) if reads_text else seen
        sequence = [_sequence(model, own(tokens, image), pictures.grid) for image in images]
    return Laid(found, sequence)


def _group(
    model: DeepStackForConditionalGeneration,
    source: Source,
    group: int,
    own: dict[Source, Tensor],
    grid: tuple[int, int],
) -> Float[Tensor, "n d"]:
    """What ``group`` of one image adds; ``own`` are the tokens of its views."""
    plan = model.plan
    match source:
        case Source.global_view:
            return own[source][0]
        case Source.tiles:
            groups = _deal(own[source], grid, plan.dealing)
            return groups[group] if group < len(groups) else torch.zeros_like(groups[0])
        case Source.detail:
            fine = (plan.detail, plan.detail)
            of_views = [_deal(each, fine, plan.dealing)[group] for each in own[source].split(plan.detail**2)]
            again = plan.newline is Newline.rows_and_groups
            return _string(model, of_views[:1], of_views[1:], grid, newline=again)
        case Source.tap | Source.spatial:
            return _string(model, list(own[source][:1]), list(own[source][1:]), grid, newline=False)


def _sequence(
    model: DeepStackForConditionalGeneration, own: dict[Source, Tensor], grid: tuple[int, int]
) -> Float[Tensor, "n d"]:
    """What one image contributes to the text."""
    plan = model.plan
    small = own[Source.global_view][0]
    match plan.sequence:
        case Sequence.blank:
            return small.new_zeros(len(small) // plan.pooling**2, model.config.text_config.hidden_size)
        case Sequence.channels:
            groups = _deal(own[Source.tiles], grid, plan.dealing)
            groups += [torch.zeros_like(small)] * (plan.most_tiles - len(groups))
            assert model.projector is not None
            return model.projector(torch.cat([small, *groups], dim=-1))
        case Sequence.global_view:
            return small
        case _:
            first = [] if plan.sequence is Sequence.tiles else [small]
            return _string(model, first, list(own[Source.tiles]), grid, newline=plan.newline is not Newline.none)


def _string(
    model: DeepStackForConditionalGeneration,
    small: list[Tensor],
    tiles: list[Tensor],
    grid: tuple[int, int],
    *,
    newline: bool,
) -> Float[Tensor, "n d"]:
    """Tokens of a global view and of tiles as they follow each other in the text."""
    plan = model.plan
    if plan.sequence in (Sequence.global_view, Sequence.blank):
        return small[0]
    if plan.order is Order.by_group:
        groups = _deal(torch.stack(tiles), grid, plan.dealing)
        if plan.unfilled is Unfilled.zeros:
            groups += [torch.zeros_like(groups[0])] * (plan.most_tiles - len(groups))
        return torch.cat([*small, *groups])
    rows = _mosaic(torch.stack(tiles), grid)
    if newline:
        assert model.image_newline is not None
        rows = torch.cat([rows, model.image_newline.to(rows.dtype).expand(len(rows), 1, -1)], dim=1)
    return torch.cat([*small, rows.flatten(0, 1)])


def misread(embeds: Float[Tensor, "b t d"], visual: Bool[Tensor, "b t"], planned: list[Float[Tensor, "n d"]]) -> str:
    """What is wrong with the images in the text that enters the LLM."""
    expected, found = torch.cat(planned), embeds[visual]
    if found.shape != expected.shape:
        return f"images take {len(found)} positions of the text, but the plan lays {len(expected)} tokens there"
    wrong = int((~_fits(found, expected)).sum())
    return f"the text does not hold what the plan lays there at {wrong} of {len(found)} positions" if wrong else ""


def misdealt(
    trace: InjectionTrace, owner: Int[Tensor, "..."], planned: list[Float[Tensor, "p2 d"]], scale: Tensor | None
) -> str:
    """What is wrong with the tokens that ``trace`` added, where image by image ``planned``, times the gate, belongs."""
    wrong, positions = 0, 0
    for image, tokens in enumerate(planned):
        added = trace.added[owner == image]
        if trace.injection.operator is Operator.noise:
            tokens = noise_like(tokens)
        expected = tokens if scale is None else tokens * scale
        if added.shape != expected.shape:
            return f"image {image} takes {len(added)} positions, but its group holds {len(expected)} tokens"
        fits = _fits(added, expected)
        wrong, positions = wrong + int((~fits).sum()), positions + len(fits)
    if not wrong:
        return ""
    what, views = trace.injection.what, VIEWS[trace.injection.source]
    return f"{what} is not the one dealt from its image's {views} at {wrong} of {positions} positions"


def _fits(found: Float[Tensor, "n d"], expected: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Which tokens are the expected ones, but for rounding; false for NaN too."""
    close = max(_CLOSE, 4 * torch.finfo(found.dtype).eps, 4 * torch.finfo(expected.dtype).eps)
    apart = (found.float() - expected.float()).norm(dim=-1)
    return apart <= close * expected.float().norm(dim=-1)


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
        case Dealing.scattered:
            tokens = _mosaic(tiles, grid).flatten(0, 1)
            anywhere = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)
            return list(tokens[anywhere].split(tiles.shape[1]))
        case Dealing.tiles:
            return list(tiles)
