"""The picture of what is dealt: on the tiles that the model is given, every token in its group's colour."""

from dataclasses import replace

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image
from small_run import STACKED, small_processor

from deepstack_pl.inspection.dealt import dealt_figure
from deepstack_pl.inspection.plots import colour
from deepstack_pl.stacking.config import Dealing, ModelConfig, Source


@pytest.mark.parametrize(
    ("dealing", "size", "grid", "first_row"),
    [
        (Dealing.strided_2d, (64, 64), (2, 2), [0, 1, 0, 1, 0, 1, 0, 1]),
        (Dealing.tiles, (64, 64), (2, 2), [0, 0, 0, 0, 1, 1, 1, 1]),
        (Dealing.strided_2d, (16, 48), (1, 3), [0, 0, 0, 0]),
    ],
)
def test_each_token_has_the_colour_of_its_group(
    dealing: Dealing, size: tuple[int, int], grid: tuple[int, int], first_row: list[int]
) -> None:
    figure = dealt_figure(Image.new("RGB", size), small_processor(replace(STACKED, dealing=dealing)))
    assert figure is not None
    tokens = [p for p in figure.axes[1].patches if isinstance(p, Rectangle) and p.get_fill()]
    assert len(tokens) == grid[0] * grid[1] * 16
    top = sorted((p for p in tokens if p.get_y() == -0.5), key=lambda p: p.get_x())
    expected = [to_rgba(colour((Source.tiles, group)), 0.55) for group in first_row]
    assert [p.get_facecolor() for p in top] == expected
    assert [text.get_text() for text in figure.legends[0].get_texts()][1] == "group 1: llm layer 2"


def test_nothing_is_drawn_where_nothing_is_dealt_from_tiles() -> None:
    plain = ModelConfig(name="baseline", tiles=0, groups=0)
    assert dealt_figure(Image.new("RGB", (9, 9)), small_processor(plain)) is None
