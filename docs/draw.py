"""The README's pictures: ``python docs/draw.py`` writes docs/images/page.png and docs/images/plan.png."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from deepstack_pl.data.config import FinePrintConfig
from deepstack_pl.data.fine_print import draw_page
from deepstack_pl.data.loom import Loom
from deepstack_pl.inspection.plots import plan_figure
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.stacking.plan import Plan

IMAGES = Path(__file__).parent / "images"


def page_picture() -> Figure:
    """One page as a person sees it, as the tiles show it, and as the global view does."""
    config = FinePrintConfig()
    page = Image.fromarray(draw_page(Loom(config), "val", 0).pixels)
    shown = [
        ("the page, 192 pixels", page),
        ("enlarged: what the four tiles show, 64 pixels", page.resize((64, 64), Image.Resampling.BICUBIC)),
        ("the global view, 32 pixels: no weave is left", page.resize((32, 32), Image.Resampling.BICUBIC)),
    ]
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, image) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    page_picture().savefig(IMAGES / "page.png", dpi=110)
    plan = Plan.build(ModelConfig(name="deepstack_l"), llm_layers=12, vit_layers=4)
    plan_figure(plan, tokens_per_view=16).savefig(IMAGES / "plan.png", dpi=110)
