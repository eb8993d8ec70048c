import numpy as np
import pytest
import torch
from PIL import Image

from deepstack_pl.stacking.config import GridRule, ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import as_rgb, full_grid_size, views_of

VISION = VisionConfig(name="t", image_size=16, patch_size=4, width=8, layers=2, heads=2, mean=[0.0] * 3, std=[1.0] * 3)


def plan(**change: object) -> Plan:
    return Plan.build(ModelConfig(name="p", **change), llm_layers=8, vit_layers=1)  # type: ignore[arg-type]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_tiles_are_the_enlarged_image_in_raster_order_after_the_global_view() -> None:
    image = picture(50, 40)
    views, grid = views_of(image, plan(), VISION)
    assert grid == (2, 2)
    enlarged = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    rows = [torch.cat([views[1 + 2 * y + x] for x in range(2)], dim=2) for y in range(2)]
    assert torch.equal(torch.cat(rows, dim=1), enlarged)
    small = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    assert torch.equal(views[0], small)


def test_a_plan_without_tiles_makes_one_view() -> None:
    views, grid = views_of(picture(50, 40), plan(tiles=0, groups=0), VISION)
    assert (views.shape, grid) == ((1, 3, 16, 16), None)


@pytest.mark.parametrize(
    ("tiles", "rule"), [(4, "best_fit"), (4, "square"), (6, "best_fit"), (9, "square"), (5, "square")]
)
def test_the_worst_case_image_fills_the_largest_grid(tiles: int, rule: str) -> None:
    made = plan(tiles=tiles, groups=0, grid=GridRule(rule))
    views, _ = views_of(picture(*full_grid_size(made, VISION)), made, VISION)
    assert len(views) == 1 + made.most_tiles


def test_transparency_lies_on_white_and_16_bits_are_scaled_not_clipped() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert as_rgb(deep).getpixel((0, 0)) == (128, 128, 128)
    assert as_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
