import pytest
import torch
from small_run import VISION

from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.encoder import VisionEncoder
from deepstack_pl.vision.views import normalise

LEVELS = torch.arange(256).repeat(6)[torch.randperm(1536, generator=torch.Generator().manual_seed(0))]
LEVELS = LEVELS.to(torch.uint8).reshape(2, 3, 16, 16)


def encoder(dtype: torch.dtype = torch.float32, **plan: object) -> VisionEncoder:
    torch.manual_seed(0)
    made = Plan.build(ModelConfig(name="p", **plan), llm_layers=8, vit_layers=VISION.tap)  # type: ignore[arg-type]
    return VisionEncoder(VISION, made).to(dtype)


def test_levels_are_normalised_in_float32_to_the_last_bit() -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (VISION.mean, VISION.std))
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = normalise(every, VISION)
    assert found.dtype is torch.float32
    assert torch.equal(found, (every.float() / 255 - mean) / std)


def test_float_views_are_taken_as_normalised() -> None:
    views = torch.randn(2, 3, 16, 16)
    assert normalise(views, VISION) is views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_enter_the_tower_as_their_normalised_values_in_its_dtype(dtype: torch.dtype) -> None:
    tower, rows = encoder(dtype, tiles=0, groups=0), torch.empty(0, 32, dtype=torch.long)
    expected = tower.tower.embed(normalise(LEVELS, VISION).to(dtype))
    for block in tower.tower.blocks[: VISION.tap]:
        expected = block(expected)
    assert torch.equal(tower(LEVELS, rows)[0], expected[:, 1:])
    assert torch.equal(tower(normalise(LEVELS, VISION), rows)[0], expected[:, 1:])


def test_levels_are_normalised_before_autocast_makes_them_coarse() -> None:
    tower, rows = encoder(tiles=0, groups=0), torch.empty(0, 32, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower(LEVELS, rows)[0], tower(normalise(LEVELS, VISION), rows)[0])


def test_views_that_nothing_reads_change_nothing() -> None:
    tower = encoder(tiles=0, groups=0)
    rows = torch.empty(0, 16, dtype=torch.long)  # one image: the second view is nobody's
    assert torch.equal(tower(LEVELS, rows)[0], tower(LEVELS[:1], rows)[0])
