"""Whatever plan is accepted equals the oracle, on whatever batch: drawn at random, so that settings meet that nobody
had in mind.
"""

import random
import re
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from ablations import ARMS, Arm, assert_close_for_its_size, assert_like_the_oracle, collated, model_of, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import forward_slowly
from tiny import IMAGE_TOKEN, picture
from torch import Tensor

from deepstack_pl.batch import IGNORE_INDEX, PadSide
from deepstack_pl.multimodal.config import ProjectorKind, Sharing
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
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)

ROWS = [
    ([1, 5, 6, 2], []),
    ([1, 63, 11, 12, 2], [picture(0, 64, 64)]),
    ([1, 20, 63, 21, 63, 23, 2], [picture(1, 90, 30), picture(2, 20, 50)]),
]
VALUES = {
    "tiles": (0, 1, 2, 3, 4, 4, 6),
    "detail": (1, 2, 3),
    "pooling": (1, 2, 4),
    "groups": (0, 1, 2, 4),
    "start_layer": (0, 1, 2),
    "interval": (0, 1, 2),
    "taps": ([], [1, 3], [-1, 0], [2]),
    **{
        name: tuple(kind)
        for name, kind in {
            "grid": GridRule,
            "resize": Resize,
            "encoding": Encoding,
            "dealing": Dealing,
            "sequence": Sequence,
            "order": Order,
            "unfilled": Unfilled,
            "newline": Newline,
            "source": Source,
            "host": Host,
            "operator": Operator,
            "overflow": Overflow,
        }.items()
    },
}
WITHOUT_VALUES = {"name", "collisions", "injections"}


def drawn(draw: random.Random) -> Arm:
    """A plan of which about half is default; many are refused."""
    values = {name: draw.choice(choices) for name, choices in VALUES.items() if draw.random() < 0.5}
    if draw.random() < 0.4:  # or strings in raster order would be rare
        values |= {"sequence": Sequence.global_and_tiles, "order": Order.raster, "unfilled": Unfilled.leave_out}
    injections = [
        InjectionConfig(
            layer=draw.randrange(4),
            group=draw.randrange(3),
            source=draw.choice(list(Source)),
            host=draw.choice(list(Host)),
            operator=draw.choice(list(Operator)),
        )
        for _ in range(draw.choice((0, 0, 1, 2)))
    ]
    plan = ModelConfig(name="drawn", collisions=Collisions.sum, injections=injections, **values)
    return Arm(plan, draw.choice(list(Sharing)), kind=draw.choice(list(ProjectorKind)))


def test_every_setting_of_a_plan_is_drawn() -> None:
    assert {field.name for field in fields(ModelConfig)} == {*VALUES} | WITHOUT_VALUES


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_is_refused_in_a_sentence_or_equals_the_oracle(seed: int) -> None:
    draw, compared, refused = random.Random(seed), 0, []
    while compared < 10:
        arm = drawn(draw)
        try:
            model = model_of(arm, seed=compared)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert_like_the_oracle(model, ROWS, draw.choice(list(PadSide)))
        compared += 1
    assert all(re.search(r"(model|projector)\.\w+.*\.$", sentence) for sentence in refused), refused


SIDE = st.integers(1, 90)
PICTURES = st.builds(picture, st.integers(0, 9), SIDE, SIDE)
WORDS = st.lists(st.integers(3, 60), max_size=5)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[int], list]:
    """Text around, between, before and after up to three images, or no image, or nothing but one."""
    images = draw(st.lists(PICTURES, max_size=3))
    ids = draw(WORDS)
    for _ in images:
        ids += [IMAGE_TOKEN, *draw(WORDS)]
    return ids or [1], images


def arm_of(seed: int) -> Arm:
    """A published ablation, or the first plan from ``seed`` on that is not refused."""
    draw = random.Random(seed)
    if seed % 2:
        return ARMS[draw.choice([*ARMS])]
    while True:
        arm = drawn(draw)
        try:
            model_of(arm)
        except ValueError:
            continue
        return arm


def oracles_losses(model, row, sample) -> tuple[Tensor, Tensor]:
    logits, visual = forward_slowly(model, *row)
    assert torch.equal(visual, sample.token_index >= 0)
    learned = sample.labels[1:] != IGNORE_INDEX
    return logits, F.cross_entropy(logits[:-1][learned], sample.labels[1:][learned], reduction="none")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.lists(conversations(), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 3)),
    side=st.sampled_from(PadSide),
)
def test_any_batch_under_any_plan_is_the_oracles_side_by_side_and_packed(
    seed: int, rows: list, cuts: set[int], side: PadSide
) -> None:
    model = model_of(arm_of(seed), seed)
    samples = samples_of(model, rows)
    for sample in samples:
        sample.labels = sample.input_ids.masked_fill(sample.token_index >= 0, IGNORE_INDEX)
    places = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    with torch.no_grad():
        expected = [oracles_losses(model, row, sample) for row, sample in zip(rows, samples, strict=True)]
        batch = collated(model, samples, side)
        found = model(**batch.model_inputs()).logits
        for logits, mask, (wanted, _) in zip(found, batch.attention_mask, expected, strict=True):
            assert_close_for_its_size(logits[mask], wanted)
        batch = collated(model, [samples[a:b] for a, b in pairwise(places)], side)  # several in a row
        losses = model(**batch.training_inputs(), use_cache=False).losses
    owners = batch.sample_ids().flatten()[batch.learned_at]
    for place, (_, wanted) in enumerate(expected):
        own = losses[(owners == place) & (batch.targets != IGNORE_INDEX)]
        torch.testing.assert_close(own, wanted, atol=2e-4, rtol=1e-4)
