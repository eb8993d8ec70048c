"""What DeepStack is, written the slow way: one sample, one image, one group, one layer at a time.

No index tables, no batch, no hooks: two-dimensional slices of a mosaic, and a loop over a Llama's layers.
"""

import torch
from PIL import Image
from torch import Tensor

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Dealing, Host, Operator, Sequence
from deepstack_pl.vision.views import views_of


def deal_slowly(tiles: Tensor, grid: tuple[int, int], dealing: Dealing) -> list[Tensor]:
    """``tiles`` [tiles, p * p, d] in raster order -> one [p * p, d] a group."""
    columns, rows = grid
    p = int(tiles.shape[1] ** 0.5)
    mosaic = torch.cat(
        [torch.cat([tiles[y * columns + x].view(p, p, -1) for x in range(columns)], dim=1) for y in range(rows)], dim=0
    )
    if dealing is Dealing.strided_2d:
        return [mosaic[i::rows, j::columns].reshape(p * p, -1) for i in range(rows) for j in range(columns)]
    if dealing is Dealing.strided_1d:
        flat = mosaic.reshape(-1, mosaic.shape[-1])
        return [flat[k :: rows * columns] for k in range(rows * columns)]
    return list(tiles)


def encode_slowly(model: DeepStackForConditionalGeneration, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
    """The projected global view [p * p, d] and groups for the LLM."""
    plan, tower = model.plan, model.vision_tower.tower
    views, grid = views_of(image, plan, tower.config)
    states = [tower.embed(view[None])[0] for view in views]
    at, groups = plan.at(Host.vit), None
    for layer in range(plan.vit_layers + 1):
        if at and layer == min(at):
            groups = deal_slowly(torch.stack([s[1:] for s in states[1:]]), grid, plan.dealing)
        for injection in at.get(layer, ()):
            if injection.group < len(groups):
                scale = model.gates["vit"].tanh()[plan.gated(Host.vit).index(injection)] if _gated(injection) else 1
                states[0] = torch.cat([states[0][:1], states[0][1:] + scale * groups[injection.group]])
        if layer < plan.vit_layers:
            states = [tower.blocks[layer](state[None])[0] for state in states]
    tokens = [model.projector(state[1:]) for state in states]
    return tokens[0], deal_slowly(torch.stack(tokens[1:]), grid, plan.dealing) if grid else []


def forward_slowly(
    model: DeepStackForConditionalGeneration, ids: list[int], images: list[Image.Image]
) -> tuple[Tensor, Tensor]:
    """Logits [t, vocabulary] of one sample with unexpanded ``ids``, and the mask [t] of its visual positions."""
    llm, plan = model.language_model.get_decoder(), model.plan
    pieces, additions, visual, image = [], [], [], 0
    for token in ids:
        if token != model.config.image_token_id:
            pieces.append(llm.embed_tokens(torch.tensor([token])))
            visual.append(False)
            continue
        tokens, groups = encode_slowly(model, images[image])
        start = len(visual)
        additions += [(start, k, group) for k, group in enumerate(groups)]
        if plan.sequence is Sequence.global_and_tiles:
            tokens = torch.cat([tokens, *groups])
        pieces.append(tokens)
        visual += [True] * len(tokens)
        image += 1
    hidden = torch.cat(pieces)[None]
    positions = torch.arange(hidden.shape[1])[None]
    causal = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    at = plan.at(Host.llm)
    for number, layer in enumerate(llm.layers):
        for injection in at.get(number, ()):
            scale = model.gates["llm"].tanh()[plan.gated(Host.llm).index(injection)] if _gated(injection) else 1
            for start, k, group in additions:
                if k == injection.group:
                    stop = start + len(group)
                    hidden = torch.cat(
                        [hidden[:, :start], hidden[:, start:stop] + scale * group, hidden[:, stop:]], dim=1
                    )
        hidden = layer(
            hidden, attention_mask=causal, position_embeddings=llm.rotary_emb(hidden, positions), position_ids=positions
        )
    return model.language_model.lm_head(llm.norm(hidden))[0], torch.tensor(visual)


def _gated(injection) -> bool:
    return injection.operator is Operator.gated_add
