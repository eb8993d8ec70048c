"""What DeepStack is, written the slow way: one sample, one image, one group, one layer at a time.

No index tables, no batch, no hooks, and nothing of what the product cuts, deals or lays out: images cut by Pillow,
two-dimensional slices of a mosaic, and a loop over a Llama's layers. It is the same for every plan (method A, B).
"""

from dataclasses import dataclass
from math import ceil, isqrt

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import (
    Dealing,
    Encoding,
    GridRule,
    Host,
    Newline,
    Operator,
    Order,
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.plan import Dealt, Injection, Plan

Grid = tuple[int, int]  # columns, rows


@dataclass
class Seen:
    """One image, view by view: pixels [3, s, s] before the tower, tokens [p * p, d] after it.

    ``details`` are the views of the enlarged global view, then those of each enlarged tile.
    """

    whole: Tensor
    tiles: list[Tensor]
    details: list[list[Tensor]]
    grid: Grid


# From an image to pixels


def grid_slowly(width: int, height: int, side: int, plan: Plan) -> Grid:
    """Columns and rows: LLaVA's rule over all grids but 1 x 1 (method A.1), the first of equals."""
    if not plan.tiles:
        return 0, 0
    if plan.grid is GridRule.square:
        return isqrt(plan.tiles), isqrt(plan.tiles)
    ranked = []
    for columns in range(1, plan.tiles + 1):
        for rows in range(1, plan.tiles + 1):
            if 1 < columns * rows <= plan.tiles:
                scale = min(columns * side / width, rows * side / height)
                effective = min(int(width * scale) * int(height * scale), width * height)
                ranked.append((-effective, columns * rows * side * side - effective, (columns, rows)))
    return min(ranked, key=lambda each: each[:2])[2]


def cut_slowly(image: Image.Image, grid: Grid, side: int, resize: Resize = Resize.stretch) -> list[Image.Image]:
    """``image`` enlarged to ``grid`` cells of ``side`` pixels, cell by cell in raster order."""
    columns, rows = grid
    size = (columns * side, rows * side)
    if resize is Resize.letterbox:  # as LLaVA does: one side fits, the other is rounded up
        wide, high = size[0] / image.width, size[1] / image.height
        width = size[0] if wide < high else min(ceil(image.width * high), size[0])
        height = min(ceil(image.height * wide), size[1]) if wide < high else size[1]
        large = Image.new("RGB", size, (0, 0, 0))
        inner = image.resize((width, height), Image.Resampling.BICUBIC)
        large.paste(inner, ((size[0] - width) // 2, (size[1] - height) // 2))
    else:
        large = image.resize(size, Image.Resampling.BICUBIC)
    return [
        large.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]


def views_slowly(model: DeepStackForConditionalGeneration, image: Image.Image) -> Seen:
    """The views of one image, normalised."""
    plan, vision = model.plan, model.vision_tower.tower.config
    side, u = vision.image_size, plan.detail
    columns, rows = grid = grid_slowly(*image.size, side, plan)
    details = []
    if u > 1:
        details.append(cut_slowly(image, (u, u), side))
        fine = cut_slowly(image, (columns * u, rows * u), side) if columns else []
        for y in range(rows):
            for x in range(columns):
                details.append([fine[(y * u + i) * columns * u + x * u + j] for i in range(u) for j in range(u)])

    def normalised(view: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(view)).float() / 255
        return ((pixels - torch.tensor(vision.mean)) / torch.tensor(vision.std)).permute(2, 0, 1)

    return Seen(
        whole=normalised(cut_slowly(image, (1, 1), side)[0]),
        tiles=[normalised(tile) for tile in (cut_slowly(image, grid, side, plan.resize) if columns else [])],
        details=[[normalised(view) for view in own] for own in details],
        grid=grid,
    )


# From pixels to tokens


def mosaic_of(tiles: list[Tensor], grid: Grid) -> Tensor:
    """Squares [h, w, ...], raster order -> the picture they are tiles of."""
    columns, rows = grid
    return torch.cat([torch.cat([tiles[y * columns + x] for x in range(columns)], dim=1) for y in range(rows)], dim=0)


def square(tokens: Tensor) -> Tensor:
    """[p * p, d] -> [p, p, d]."""
    return tokens.view(isqrt(len(tokens)), isqrt(len(tokens)), -1)


def deal_slowly(tiles: list[Tensor], grid: Grid, dealing: Dealing) -> list[Tensor]:
    """Tokens [p * p, d] of each tile in raster order -> those of each group (method A.3)."""
    columns, rows = grid
    if not tiles or dealing is Dealing.tiles:
        return tiles
    mosaic = mosaic_of([square(tile) for tile in tiles], grid)
    if dealing is Dealing.strided_2d:
        return [mosaic[i::rows, j::columns].flatten(0, 1) for i in range(rows) for j in range(columns)]
    return [mosaic.flatten(0, 1)[k :: rows * columns] for k in range(rows * columns)]


def embed_slowly(model: DeepStackForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Hidden state 0 of a picture [3, h, w] of any size: positions are interpolated where it is no single view."""
    visual = model.vision_tower.tower.visual
    patches = visual.conv1(pixels[None])[0]
    first, own = visual.positional_embedding[0], square(visual.positional_embedding[1:])
    positions = F.interpolate(own.permute(2, 0, 1)[None], patches.shape[1:], mode="bicubic", align_corners=False)[0]
    tokens = (patches + positions).flatten(1).T
    return visual.ln_pre(torch.cat([(visual.class_embedding + first)[None], tokens]))


def tower_slowly(model: DeepStackForConditionalGeneration, pixels: Seen) -> Seen:
    """The selected hidden state of every view, class tokens left out; the LLM sees nothing yet."""
    plan, grid, joined = model.plan, pixels.grid, model.plan.encoding is Encoding.one_pass
    tiles = pixels.tiles
    if joined and tiles:
        tiles = [mosaic_of([tile.permute(1, 2, 0) for tile in tiles], grid).permute(2, 0, 1)]
    states = [
        embed_slowly(model, view) for view in [pixels.whole, *tiles, *(view for own in pixels.details for view in own)]
    ]
    at, groups = plan.at(Host.vit), {}
    for layer in range(plan.vit_layers + 1):
        if at and layer == min(at):
            dealt = deal_slowly([state[1:] for state in states[1 : 1 + len(tiles)]], grid, plan.dealing)
            groups = {(Source.tiles, k): group for k, group in enumerate(dealt)}
            groups[Source.global_view, 0] = states[0][1:]
        for injection in at.get(layer, ()):
            if injection.dealt in groups:
                added = scale_of(model, injection) * groups[injection.dealt]
                states[0] = torch.cat([states[0][:1], states[0][1:] + added])
        if layer < plan.vit_layers:
            states = [model.vision_tower.tower.blocks[layer](state[None])[0] for state in states]
    features = [state[1:] for state in states]
    own = features[1 : 1 + len(tiles)]
    if joined and own:
        large = own[0].view(grid[1] * isqrt(len(features[0])), grid[0] * isqrt(len(features[0])), -1)
        rows = [row.chunk(grid[0], dim=1) for row in large.chunk(grid[1], dim=0)]
        own = [tile.flatten(0, 1) for row in rows for tile in row]
    rest = features[1 + len(tiles) :]
    per_view = plan.detail**2
    return Seen(features[0], own, [rest[i : i + per_view] for i in range(0, len(rest), per_view)], grid)


def project_slowly(model: DeepStackForConditionalGeneration, seen: Seen) -> Seen:
    """Each view projected, then averaged over squares of ``pooling`` x ``pooling`` tokens."""
    f = model.plan.pooling
    shared = model.config.projector_sharing == "shared"
    of_whole = model.projector if shared else model.projector.global_view
    of_others = model.projector if shared else model.projector.tiles

    def pooled(tokens: Tensor) -> Tensor:
        large = square(tokens)
        return (sum(large[i::f, j::f] for i in range(f) for j in range(f)) / f**2).flatten(0, 1)

    return Seen(
        pooled(of_whole(seen.whole)),
        [pooled(of_others(tile)) for tile in seen.tiles],
        [[pooled(of_others(view)) for view in own] for own in seen.details],
        seen.grid,
    )


# From tokens to the text sequence


def lay_slowly(plan: Plan, whole: Tensor, tiles: list[Tensor], grid: Grid, newline: Tensor | None) -> Tensor:
    """What an image's views are in the text sequence, [t, d]."""
    parts = [] if plan.sequence is Sequence.tiles else [whole]
    if plan.sequence in (Sequence.global_and_tiles, Sequence.tiles):
        if plan.order is Order.raster and tiles:
            for row in mosaic_of([square(tile) for tile in tiles], grid):
                parts += [row] if newline is None else [row, newline[None]]
        else:
            parts += deal_slowly(tiles, grid, plan.dealing)
            if plan.unfilled is Unfilled.zeros:
                most = isqrt(plan.tiles) ** 2 if plan.grid is GridRule.square else plan.tiles
                parts += [torch.zeros_like(whole)] * (most - len(tiles))
    return torch.cat(parts)


def encode_slowly(model: DeepStackForConditionalGeneration, image: Image.Image) -> tuple[Tensor, dict[Dealt, Tensor]]:
    """What one image is in the text sequence [t, d], and what each group adds to it from its first position on."""
    plan = model.plan
    features = tower_slowly(model, views_slowly(model, image))
    if plan.sequence is Sequence.channels:
        most = isqrt(plan.tiles) ** 2 if plan.grid is GridRule.square else plan.tiles
        beside = deal_slowly(features.tiles, features.grid, plan.dealing)
        beside += [torch.zeros_like(features.whole)] * (most - len(beside))
        return model.projector(torch.cat([features.whole, *beside], dim=1)), {}
    seen = project_slowly(model, features)
    newline = None if plan.newline is Newline.none else model.image_newline
    tokens = lay_slowly(plan, seen.whole, seen.tiles, seen.grid, newline)
    if plan.sequence is Sequence.blank:
        tokens = torch.zeros_like(tokens)
    groups: dict[Dealt, Tensor] = {(Source.global_view, 0): seen.whole}
    for k, group in enumerate(deal_slowly(seen.tiles, seen.grid, plan.dealing)):
        groups[Source.tiles, k] = group
    if seen.details:
        again = None if newline is None else newline * (plan.newline is Newline.rows_and_groups)
        side = (plan.detail, plan.detail)
        dealt = [deal_slowly(own, side, plan.dealing) for own in seen.details]  # for each view, each group
        for k in range(plan.detail**2):
            whole, *tiles = [of_view[k] for of_view in dealt]
            groups[Source.detail, k] = lay_slowly(plan, whole, tiles, seen.grid, again)
    return tokens, groups


# The whole model


def scale_of(model: DeepStackForConditionalGeneration, injection: Injection) -> Tensor | int:
    if injection.operator is not Operator.gated_add:
        return 1
    gated = [i for i in model.plan.injections if i.host is injection.host and i.operator is Operator.gated_add]
    return model.gates[injection.host.value].tanh()[gated.index(injection)]


def forward_slowly(
    model: DeepStackForConditionalGeneration,
    ids: list[int],
    images: list[Image.Image],
    max_length: int | None = None,
    layer_inputs: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [t, vocabulary] of one sample with unexpanded ``ids``, and the mask [t] of its visual positions.

    What lies beyond ``max_length`` positions is cut; ``layer_inputs`` receives what each decoder layer is given.
    """
    llm = model.language_model.get_decoder()
    pieces, additions, visual, remaining = [], [], [], list(images)
    for token in ids:
        if token != model.config.image_token_id:
            pieces.append(llm.embed_tokens(torch.tensor([token])))
            visual.append(False)
            continue
        tokens, groups = encode_slowly(model, remaining.pop(0))
        additions.append((len(visual), groups))
        pieces.append(tokens)
        visual += [True] * len(tokens)
    hidden = torch.cat(pieces)[:max_length]
    length = len(hidden)
    positions = torch.arange(length)[None]
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for number, layer in enumerate(llm.layers):
        for injection in model.plan.at(Host.llm).get(number, ()):
            for start, groups in additions:
                if injection.dealt in groups:
                    group = groups[injection.dealt][: max(length - start, 0)]
                    stop = start + len(group)
                    added = hidden[start:stop] + scale_of(model, injection) * group
                    hidden = torch.cat([hidden[:start], added, hidden[stop:]])
        if layer_inputs is not None:
            layer_inputs.append(hidden)
        rotary = llm.rotary_emb(hidden[None], positions)
        hidden = layer(hidden[None], attention_mask=causal, position_embeddings=rotary, position_ids=positions)[0]
    return model.language_model.lm_head(llm.norm(hidden)), torch.tensor(visual[:max_length])
