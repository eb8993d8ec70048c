"""What DeepStack is, written the slow way: one sample, one image, one group, one layer at a time.

No index tables, no batch, no hooks, and nothing of what the product cuts, deals or lays out: images cut by Pillow,
two-dimensional slices of a mosaic, and a loop over a Llama's layers. It is the same for every plan (method A, B).
"""

from dataclasses import dataclass, field
from math import ceil, isqrt, pi, sin

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
    taps: "list[Seen]" = field(default_factory=list)


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
    in_order = mosaic.flatten(0, 1)
    if dealing is Dealing.scattered:
        anywhere = torch.randperm(len(in_order), generator=torch.Generator().manual_seed(0)).tolist()
        every = torch.stack([in_order[place] for place in anywhere])
        return list(every.chunk(rows * columns))
    return [in_order[k :: rows * columns] for k in range(rows * columns)]


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
    at, groups, tapped = plan.at(Host.vit), {}, {}
    for layer in range(plan.vit_layers + 1):
        if at and layer == min(at):
            dealt = deal_slowly([state[1:] for state in states[1 : 1 + len(tiles)]], grid, plan.dealing)
            groups = {(Source.tiles, k): group for k, group in enumerate(dealt)}
            groups[Source.global_view, 0] = states[0][1:]
        for injection in at.get(layer, ()):
            if injection.dealt in groups:
                added = added_by(model, injection, groups[injection.dealt])
                states[0] = torch.cat([states[0][:1], states[0][1:] + added])
        tapped[layer] = states
        if layer < plan.vit_layers:
            states = [model.vision_tower.tower.blocks[layer](state[None])[0] for state in states]
    seen = _sorted(plan, states, len(tiles), grid, joined)
    seen.taps = [_sorted(plan, tapped[tap], len(tiles), grid, joined) for tap in plan.taps]
    return seen


def _sorted(plan: Plan, states: list[Tensor], tiles: int, grid: Grid, joined: bool) -> Seen:
    """Hidden states of all views, as what they are of."""
    features = [state[1:] for state in states]
    own = features[1 : 1 + tiles]
    if joined and own:
        large = own[0].view(grid[1] * isqrt(len(features[0])), grid[0] * isqrt(len(features[0])), -1)
        rows = [row.chunk(grid[0], dim=1) for row in large.chunk(grid[1], dim=0)]
        own = [tile.flatten(0, 1) for row in rows for tile in row]
    rest = features[1 + tiles :]
    per_view = plan.detail**2
    return Seen(features[0], own, [rest[i : i + per_view] for i in range(0, len(rest), per_view)], grid)


def project_slowly(model: DeepStackForConditionalGeneration, seen: Seen, dealt: Dealt | None = None) -> Seen:
    """Each view projected, for the text or for group ``dealt``: squares of tokens averaged or joined."""
    own = None if dealt is None else dict(model.own_projectors.items()).get(f"{dealt[0].value}_{dealt[1]}")
    if own is None and model.projector is None:
        return Seen(seen.whole[:0], [], [], seen.grid)  # nothing reads it
    unshared = model.config.projector_sharing == "global_and_tiles"
    of_whole = own or (model.projector.global_view if unshared else model.projector)
    of_others = own or (model.projector.tiles if unshared else model.projector)

    def projected(project: torch.nn.Module, tokens: Tensor) -> Tensor:
        return one_slowly(model, project, tokens, dealt)

    return Seen(
        projected(of_whole, seen.whole),
        [projected(of_others, tile) for tile in seen.tiles],
        [[projected(of_others, view) for view in own] for own in seen.details],
        seen.grid,
    )


def one_slowly(
    model: DeepStackForConditionalGeneration, project: torch.nn.Module, tokens: Tensor, dealt: Dealt | None
) -> Tensor:
    """The tokens of one view through one projector, square by square."""
    f, kind, large, source = model.plan.pooling, model.config.projector, square(tokens), dealt and dealt[0]
    corners = [large[i::f, j::f].flatten(0, 1) for i in range(f) for j in range(f)]
    if source is Source.spatial:
        corners = [corners[dealt[1]]]
    if kind == "pixel_shuffle":
        return project[2](F.gelu(project[0](torch.cat(corners, dim=1))))
    if kind == "patch_merger":
        norm = project.norm
        one = len(norm.weight) // (len(corners) if source is Source.tap else 1)
        assert one == tokens.shape[1]
        corners = corners if source is Source.tap else [norm(corner) for corner in corners]
        joined = torch.cat(corners, dim=1)
        joined = norm(joined) if source is Source.tap else joined
        return project.linear_fc2(F.gelu(project.linear_fc1(joined)))
    return sum(project(corner) for corner in corners) / len(corners)


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
        taken = len(features.whole) // plan.pooling**2
        tokens = torch.zeros(taken, model.config.text_config.hidden_size)
    groups = {dealt: group_slowly(model, features, dealt) for dealt in plan.groups(Host.llm)}
    return tokens, {dealt: group for dealt, group in groups.items() if group is not None}


def group_slowly(model: DeepStackForConditionalGeneration, features: Seen, dealt: Dealt) -> Tensor | None:
    """What one group adds from an image's first position on; None where a small grid does not fill it."""
    plan, (source, k), grid = model.plan, dealt, features.grid
    seen = project_slowly(model, features.taps[k] if source is Source.tap else features, dealt)
    newline = None if plan.newline is Newline.none else model.image_newline
    if source is Source.global_view:
        return seen.whole
    if source is Source.tiles:
        groups = deal_slowly(seen.tiles, grid, plan.dealing)
        return groups[k] if k < len(groups) else None
    if source is Source.detail:
        again = None if newline is None else newline * (plan.newline is Newline.rows_and_groups)
        dealt_views = [deal_slowly(own, (plan.detail, plan.detail), plan.dealing)[k] for own in seen.details]
        return lay_slowly(plan, dealt_views[0], dealt_views[1:], grid, again)
    return lay_slowly(plan, seen.whole, seen.tiles, grid, None if newline is None else newline * 0)


# The whole model


def added_by(model: DeepStackForConditionalGeneration, injection: Injection, tokens: Tensor) -> Tensor:
    """What ``injection`` adds of the tokens [n, d] of its group."""
    if injection.operator is Operator.add:
        return tokens
    if injection.operator is Operator.noise:
        chirp = torch.tensor([sin(2 * pi * (40503 * place**2 % 65537) / 65537) for place in range(tokens.shape[1])])
        return torch.stack([token.norm() * chirp / chirp.norm() for token in tokens])
    gated = [i for i in model.plan.injections if i.host is injection.host and i.operator is Operator.gated_add]
    return model.gates[injection.host.value].tanh()[gated.index(injection)] * tokens


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
                    added = hidden[start:stop] + added_by(model, injection, group)
                    hidden = torch.cat([hidden[:start], added, hidden[stop:]])
        if layer_inputs is not None:
            layer_inputs.append(hidden)
        rotary = llm.rotary_emb(hidden[None], positions)
        hidden = layer(hidden[None], attention_mask=causal, position_embeddings=rotary, position_ids=positions)[0]
    return model.language_model.lm_head(llm.norm(hidden)), torch.tensor(visual[:max_length])
