"""Every published ablation by name, and what of a plan they leave untried; the tiny model under each, and its batches.

`assert_like_the_oracle` is the one comparison that every row of method E comes down to.
"""

from dataclasses import dataclass, replace

import torch
from oracle import forward_slowly
from tiny import IMAGE_TOKEN, MIXED, tiny_llm, tiny_vision
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.language.config import TooLong
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig, ProjectorKind, Sharing
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import (
    Collisions,
    Dealing,
    Encoding,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Operator,
    Order,
    Resize,
    Sequence,
    Source,
    Unfilled,
)

L = ModelConfig(name="l")
V = ModelConfig(name="v", host=Host.vit, start_layer=0)
HD = ModelConfig(
    name="hd",
    detail=2,
    sequence=Sequence.global_and_tiles,
    order=Order.raster,
    newline=Newline.rows_and_groups,
    source=Source.detail,
)
STRING = ModelConfig(name="string", groups=0, sequence=Sequence.global_and_tiles)
BLANK = ModelConfig(name="blank", sequence=Sequence.blank)
TAPS = ModelConfig(name="taps", tiles=0, source=Source.tap, taps=[1, 2], groups=2)
GRANITE = ModelConfig(
    name="granite",
    tiles=0,
    pooling=2,
    sequence=Sequence.blank,
    source=Source.tap,
    taps=[-1, 1],
    groups=2,
    start_layer=0,
    injections=[InjectionConfig(source=Source.spatial, group=k, layer=2 + k) for k in range(4)],
)


@dataclass(frozen=True)
class Arm:
    """A plan, how many projectors it has, and, where it tries one setting, that setting as it was before."""

    plan: ModelConfig
    sharing: Sharing = Sharing.shared
    before: dict | None = None
    kind: ProjectorKind = ProjectorKind.mlp2x_gelu


def _whole(layer: int, host: Host = Host.llm) -> InjectionConfig:
    return InjectionConfig(source=Source.global_view, layer=layer, host=host)


ARMS = {
    # Published names, where there is one
    "hd": Arm(HD, before={"newline": Newline.rows}),
    "dummy_local": Arm(replace(L, source=Source.global_view), before={"source": Source.tiles}),
    "only_global_features": Arm(
        replace(BLANK, source=Source.global_view, groups=1, start_layer=2), before={"sequence": Sequence.global_view}
    ),
    "global_and_local": Arm(replace(BLANK, start_layer=2, injections=[_whole(1)]), before={"injections": []}),
    "string_withglobal": Arm(replace(STRING, unfilled=Unfilled.zeros), before={"sequence": Sequence.tiles}),
    "string_woglobal": Arm(
        replace(STRING, sequence=Sequence.tiles, unfilled=Unfilled.zeros), before={"unfilled": Unfilled.leave_out}
    ),
    "2d_scaledown": Arm(replace(L, pooling=2), before={"pooling": 1}),
    "scaledown_clip": Arm(replace(L, groups=0, tiles=0, pooling=2), before={"pooling": 1}),
    "2xsample": Arm(replace(L, tiles=5, grid=GridRule.square), before={"tiles": 4, "grid": GridRule.best_fit}),
    "1d": Arm(replace(L, dealing=Dealing.strided_1d), before={"dealing": Dealing.strided_2d}),
    "grid": Arm(replace(L, dealing=Dealing.tiles), before={"dealing": Dealing.strided_2d}),
    "inconsistent": Arm(replace(L, resize=Resize.letterbox), before={"resize": Resize.stretch}),
    "hires_local": Arm(
        replace(L, grid=GridRule.square, encoding=Encoding.one_pass), before={"encoding": Encoding.separate}
    ),
    "deepstack_vit": Arm(replace(V, grid=GridRule.square), before={"grid": GridRule.best_fit}),
    "twoviews_unshare": Arm(L, Sharing.global_and_tiles),
    "channels": Arm(
        replace(L, groups=0, sequence=Sequence.channels, grid=GridRule.square), before={"dealing": Dealing.tiles}
    ),
    # What they leave untried
    "scattered": Arm(replace(L, dealing=Dealing.scattered), before={"dealing": Dealing.strided_2d}),
    "noise": Arm(replace(L, operator=Operator.noise), before={"operator": Operator.add}),
    "noise_in_the_tower": Arm(replace(V, operator=Operator.noise), before={"operator": Operator.add}),
    "channels_of_small_grids": Arm(
        replace(L, groups=0, sequence=Sequence.channels), before={"dealing": Dealing.strided_1d}
    ),
    "hd_newline_not_in_groups": Arm(replace(HD, newline=Newline.rows), before={"newline": Newline.none}),
    "hd_six_tiles_1d": Arm(
        replace(HD, tiles=6, dealing=Dealing.strided_1d, start_layer=0, groups=3), before={"start_layer": 1}
    ),
    "hd_by_group": Arm(
        replace(HD, newline=Newline.none, order=Order.by_group, unfilled=Unfilled.zeros),
        before={"order": Order.raster, "unfilled": Unfilled.leave_out},
    ),
    "hd_scaled_down": Arm(replace(HD, pooling=2), before={"pooling": 1}),
    "hd_unshared": Arm(HD, Sharing.global_and_tiles),
    "hd_and_v": Arm(
        replace(HD, injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)]),
        before={"injections": []},
    ),
    "detail_of_the_global_view": Arm(replace(L, tiles=0, detail=2, source=Source.detail), before={"groups": 3}),
    "string_raster": Arm(replace(STRING, order=Order.raster), before={"order": Order.by_group}),
    "string_raster_newlines_without_global": Arm(
        replace(STRING, sequence=Sequence.tiles, order=Order.raster, newline=Newline.rows),
        before={"newline": Newline.none},
    ),
    "string_of_a_square_grid": Arm(
        replace(STRING, tiles=5, grid=GridRule.square, unfilled=Unfilled.zeros), before={"grid": GridRule.best_fit}
    ),
    "string_1d_left_out_and_stacked": Arm(
        replace(STRING, dealing=Dealing.strided_1d, groups=4), before={"dealing": Dealing.strided_2d}
    ),
    "one_pass_unshared_string": Arm(
        replace(STRING, grid=GridRule.square, encoding=Encoding.one_pass, order=Order.raster), Sharing.global_and_tiles
    ),
    "v_scaled_down_global_view_gated": Arm(
        replace(V, start_layer=1, groups=2, pooling=2, operator=Operator.gated_add, injections=[_whole(0, Host.vit)]),
        before={"operator": Operator.add},
    ),
    "every_source_on_one_layer_gated": Arm(
        replace(
            HD,
            operator=Operator.gated_add,
            collisions=Collisions.sum,
            injections=[
                InjectionConfig(group=3, layer=1),
                _whole(1),
                InjectionConfig(group=0, layer=5, operator=Operator.gated_add),
                InjectionConfig(host=Host.vit, group=1, layer=2),
            ],
        ),
        before={"operator": Operator.add},
    ),
}

ARMS |= {
    # What others do with the same idea
    "input_fusion": Arm(replace(L, start_layer=0, interval=0, collisions=Collisions.sum), before={"interval": 1}),
    "taps": Arm(TAPS, before={"taps": [2, 1]}),
    "taps_of_a_merger": Arm(replace(TAPS, pooling=2), kind=ProjectorKind.patch_merger, before={"taps": [0, 3]}),
    "taps_of_a_string": Arm(
        replace(TAPS, tiles=4, sequence=Sequence.global_and_tiles, order=Order.raster, newline=Newline.rows),
        before={"taps": [1, 3]},
    ),
    "taps_under_a_stacked_tower": Arm(
        replace(TAPS, tiles=4, injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)]),
        before={"injections": []},
    ),
    "taps_unshared_gated": Arm(
        replace(TAPS, tiles=4, operator=Operator.gated_add, injections=[InjectionConfig(group=1, layer=4)]),
        Sharing.global_and_tiles,
        before={"operator": Operator.add},
    ),
    "granite": Arm(GRANITE, before={"taps": [1, -1]}),
    "granite_shuffled": Arm(GRANITE, Sharing.per_injection, before={"taps": [-1, 2]}, kind=ProjectorKind.pixel_shuffle),
    "spatial_string": Arm(replace(STRING, pooling=2, source=Source.spatial, groups=4), before={"groups": 3}),
    "per_injection": Arm(replace(L, injections=[_whole(5)]), Sharing.per_injection, before={"injections": []}),
    "pixel_shuffle": Arm(replace(L, pooling=2), kind=ProjectorKind.pixel_shuffle, before={"start_layer": 2}),
    "merger_of_details": Arm(
        replace(HD, pooling=2), Sharing.per_injection, kind=ProjectorKind.patch_merger, before={"newline": Newline.rows}
    ),
}


PLAIN = {"l": Arm(L), "v": Arm(V), "hd": Arm(HD)}


def model_of(arm: Arm, seed: int = 0) -> DeepStackForConditionalGeneration:
    """The tiny model of ``arm``, gates open."""
    projector = ProjectorConfig(name="mlp", kind=arm.kind, sharing=arm.sharing)
    model = build_model(arm.plan, tiny_llm(), tiny_vision(), projector, seed=seed, image_token_id=IMAGE_TOKEN).eval()
    for gate in model.gates.values():
        gate.data = torch.linspace(0.3, 1.0, len(gate))
    return model


def samples_of(
    model: DeepStackForConditionalGeneration,
    rows: list | None = None,
    max_length: int = 512,
    too_long: TooLong = TooLong.refuse,
) -> list[Sample]:
    return [
        make_sample(
            f"row {i}",
            ids,
            ids,
            images,
            plan=model.plan,
            vision=model.config.typed_vision(),
            image_token_id=IMAGE_TOKEN,
            max_length=max_length,
            too_long=too_long,
        )
        for i, (ids, images) in enumerate(MIXED if rows is None else rows)
    ]


def collated(
    model: DeepStackForConditionalGeneration, samples: list[Sample], side: PadSide = PadSide.right
) -> MultimodalBatch:
    patches = model.config.typed_vision().patches_per_side
    pooled = patches // model.plan.pooling
    return collate(samples, pad_id=0, side=side, tokens_per_view=pooled**2, patches_per_view=patches**2)


def batch_for(
    model: DeepStackForConditionalGeneration, rows: list | None = None, side: PadSide = PadSide.right
) -> MultimodalBatch:
    return collated(model, samples_of(model, rows), side)


def logits_of(model: DeepStackForConditionalGeneration, rows: list, side: PadSide = PadSide.right) -> list[Tensor]:
    """One [t, vocabulary] a row, padding left out."""
    batch = batch_for(model, rows, side)
    with torch.no_grad():
        logits = model(**batch.model_inputs()).logits
    return [row[mask] for row, mask in zip(logits, batch.attention_mask, strict=True)]


def assert_close_for_its_size(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.detach().abs().max()), rtol=0)


def assert_like_the_oracle(model: DeepStackForConditionalGeneration, rows: list, side: PadSide) -> None:
    for found, (ids, images) in zip(logits_of(model, rows, side), rows, strict=True):
        with torch.no_grad():
            assert_close_for_its_size(found, forward_slowly(model, ids, images)[0])
