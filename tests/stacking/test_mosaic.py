from dataclasses import replace

import pytest
import torch

from deepstack_pl.stacking.config import Dealing, GridRule, Host, ModelConfig, Sequence
from deepstack_pl.stacking.injection import gather, inject
from deepstack_pl.stacking.mosaic import best_grid, deal, image_tables
from deepstack_pl.stacking.plan import Injection, Plan

GRIDS = [(2, 2), (1, 2), (2, 1), (3, 1), (1, 4), (3, 3)]


@pytest.mark.parametrize("dealing", list(Dealing))
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_lands_in_exactly_one_group(grid: tuple[int, int], dealing: Dealing) -> None:
    groups = deal(grid, 4, dealing)
    assert groups.shape == (grid[0] * grid[1], 16)
    assert sorted(groups.flatten().tolist()) == list(range(grid[0] * grid[1] * 16))


@pytest.mark.parametrize("grid", GRIDS)
def test_strided_2d_keeps_each_token_under_the_global_cell_that_covers_it(grid: tuple[int, int]) -> None:
    columns, rows = grid
    p = 4
    for k, group in enumerate(deal(grid, p, Dealing.strided_2d)):
        i, j = divmod(k, columns)
        for t, token in enumerate(group.tolist()):
            tile, patch = divmod(token, p * p)
            y = (tile // columns) * p + patch // p
            x = (tile % columns) * p + patch % p
            assert (y // rows, x // columns) == divmod(t, p)
            assert (y % rows, x % columns) == (i, j)


def test_published_dealing_of_two_by_two_tiles_of_two_by_two_patches() -> None:
    # Mosaic by hand: tiles a b / c d, patches 0 1 / 2 3 of each.
    assert deal((2, 2), 2, Dealing.strided_2d).tolist() == [
        [0, 4, 8, 12],
        [1, 5, 9, 13],
        [2, 6, 10, 14],
        [3, 7, 11, 15],
    ]
    assert deal((2, 2), 2, Dealing.tiles).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert deal((2, 2), 2, Dealing.strided_1d).tolist()[0] == [0, 2, 8, 10]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (1, 2)),
        ((200, 200), (1, 2)),
        ((337, 337), (2, 2)),
        ((640, 480), (2, 2)),
        ((300, 400), (1, 2)),
        ((400, 300), (2, 1)),
        ((1000, 300), (3, 1)),
        ((300, 1000), (1, 3)),
        ((2000, 500), (4, 1)),
        ((1700, 2200), (2, 2)),
        ((100, 800), (1, 3)),
    ],
)
def test_grids_are_the_ones_the_published_function_chose(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert best_grid(*size, tile=336, tiles=4, rule=GridRule.best_fit) == grid
    assert best_grid(*size, tile=336, tiles=4, rule=GridRule.square) == (2, 2)


def plan(**change: object) -> Plan:
    return Plan.build(replace(ModelConfig(name="p"), **change), llm_layers=8, vit_layers=4)


def test_groups_that_a_small_grid_does_not_fill_add_nothing() -> None:
    tables = image_tables(plan(), (1, 2), 2)
    assert tables.llm.shape == (4, 4)
    assert (tables.llm[:2] >= 4).all()
    assert (tables.llm[2:] == -1).all()


def test_long_context_stands_in_the_sequence_and_injects_nothing() -> None:
    tables = image_tables(plan(groups=0, sequence=Sequence.global_and_tiles), (2, 2), 2)
    assert sorted(tables.sequence.tolist()) == list(range(20))
    assert tables.llm.shape == (0, 20)


def test_stacking_beside_a_long_sequence_reaches_the_global_view_alone() -> None:
    tables = image_tables(plan(sequence=Sequence.global_and_tiles), (2, 2), 2)
    assert (tables.llm[:, :4] >= 4).all()
    assert (tables.llm[:, 4:] == -1).all()


def test_tower_groups_have_a_table_of_their_own() -> None:
    tables = image_tables(plan(host=Host.vit, start_layer=0), (2, 2), 2)
    assert tables.llm.shape == (0, 4)
    assert torch.equal(tables.vit, deal((2, 2), 2, Dealing.strided_2d) + 4)


def test_injection_is_local_out_of_place_and_in_the_hosts_dtype() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    before = hidden.clone()
    features = torch.randn(4, 3, requires_grad=True)
    rows = torch.tensor([[-1, 0, 1, -1, -1], [-1, -1, -1, 3, -1]])
    after = inject(hidden, features, rows, Injection(Host.llm, 0, 0), None, None)
    assert after.dtype is torch.bfloat16
    assert torch.equal(hidden, before)
    assert torch.equal(after[rows < 0], hidden[rows < 0])
    assert torch.equal(after[0, 1], hidden[0, 1] + features[0].bfloat16())
    after.sum().backward()
    assert features.grad is not None
    assert features.grad.sum(1).tolist() == [3, 3, 0, 3]


def test_gathering_nothing_gives_zeros_and_a_zero_gradient() -> None:
    features = torch.randn(2, 3, requires_grad=True)
    out = gather(features, torch.full((4,), -1))
    assert not out.any()
    out.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()
