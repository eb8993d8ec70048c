from hashlib import sha256

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from deepstack_pl.stacking.config import GridRule, ModelConfig, Resize
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.views import as_rgb, full_grid_size, no_views, views_of

VISION = VisionConfig(name="t", image_size=16, patch_size=4, width=8, layers=2, heads=2, mean=[0.0] * 3, std=[1.0] * 3)

STORED = {  # by Pillow 12.3.0; Pillow 13.0.0 has another 40 x 50
    (50, 40): "0b87e6dcdbc771f6",
    (40, 50): "ef229f2804f25c32",
    (130, 97): "de2c90e20752efe5",
    (97, 130): "1fb06efca9ea9fa4",
    (16, 16): "c14cab93f5d10439",
    (3, 400): "c8c2116ca3c58903",
}


def plan(**change: object) -> Plan:
    return Plan.build(ModelConfig(name="p", **change), llm_layers=8, vit_layers=1)  # type: ignore[arg-type]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_tiles_are_the_enlarged_image_in_raster_order_after_the_global_view() -> None:
    image = picture(50, 40)
    views, grid = views_of(image, plan(), VISION)
    assert grid == (2, 2)
    enlarged = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    rows = [torch.cat([views[1 + 2 * y + x] for x in range(2)], dim=2) for y in range(2)]
    assert torch.equal(torch.cat(rows, dim=1), enlarged)
    small = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(views[0], small)


def test_a_plan_without_tiles_makes_one_view() -> None:
    views, grid = views_of(picture(50, 40), plan(tiles=0, groups=0), VISION)
    assert views.dtype is no_views(VISION).dtype is torch.uint8
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


@pytest.mark.parametrize("size", [(50, 40), (17, 60), (9, 9), (3, 40)])
@pytest.mark.parametrize("resize", list(Resize))
def test_both_backends_lay_the_same_views_in_the_same_order(size: tuple[int, int], resize: Resize) -> None:
    made = plan(resize=resize, detail=1 if resize is Resize.letterbox else 2)
    pil, grid = views_of(picture(*size), made, VISION)
    fast, same = views_of(picture(*size), made, VISION, ViewsBackend.torch)
    assert (fast.shape, fast.dtype, same) == (pil.shape, torch.uint8, grid)
    assert (pil.int() - fast.int()).abs().max() <= 2


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("backend", list(ViewsBackend))
def test_a_letterbox_is_the_picture_in_its_own_shape_centred_on_black(backend: ViewsBackend, tall: bool) -> None:
    image = Image.new("RGB", (20, 30) if tall else (30, 20), "white")
    views, grid = views_of(image, plan(resize=Resize.letterbox), VISION, backend)
    assert grid == (2, 2)
    large = torch.cat([torch.cat([views[1 + 2 * y + x] for x in range(2)], dim=2) for y in range(2)], dim=1)
    large = large.mT if tall else large
    assert large[:, 5:27].eq(255).all()  # 32 x 22 of 32 x 32
    assert not large[:, :5].any()
    assert not large[:, 27:].any()


def test_pillows_views_are_those_that_were_stored() -> None:
    found = {}
    for size in STORED:
        pixels = views_of(picture(*size), plan(), VISION)[0].permute(0, 2, 3, 1).contiguous()
        found[size] = sha256(pixels.numpy().tobytes()).hexdigest()[:16]
    assert found == STORED, f"Pillow {PIL.__version__}, numpy {np.__version__}, torch {torch.__version__}"
