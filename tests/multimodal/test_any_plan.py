"""Whatever plan is accepted equals the oracle: drawn at random, so that settings meet that nobody had in mind."""

import random
import re
from dataclasses import fields

import pytest
from ablations import Arm, assert_like_the_oracle, model_of
from tiny import picture

from deepstack_pl.batch import PadSide
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
