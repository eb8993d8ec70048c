"""Pictures: drawn for every kind of plan and answer, without pyplot's global state."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from deepstack_pl.inspection.pages import page_figure
from deepstack_pl.inspection.plots import plan_figure, to_pixels
from deepstack_pl.stacking.config import Dealing, Host, InjectionConfig, ModelConfig, Operator, Overflow, Sequence
from deepstack_pl.stacking.plan import Plan

PLANS = {
    "baseline": ModelConfig(name="baseline", tiles=0, groups=0),
    "l": ModelConfig(name="deepstack_l"),
    "v": ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0),
    "lv": ModelConfig(
        name="lv",
        operator=Operator.gated_add,
        injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)],
    ),
    "long": ModelConfig(name="long_context", groups=0, sequence=Sequence.global_and_tiles),
    "dropped": ModelConfig(name="dropped", start_layer=10, overflow=Overflow.drop),
    "nine_1d": ModelConfig(name="nine", tiles=9, groups=9, dealing=Dealing.strided_1d),
    "five_in_a_row": ModelConfig(name="five", tiles=5, groups=5, dealing=Dealing.tiles),
}
PAGE = Image.new("RGB", (64, 48), (180, 60, 30))


def plan_of(name: str) -> Plan:
    return Plan.build(PLANS[name], llm_layers=12, vit_layers=5)


def texts(figure) -> str:
    return (
        "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)
        + "\n"
        + "\n".join(text.get_text() for text in figure.texts)
    )


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_can_be_drawn_with_an_arrow_for_each_injection(name):
    plan = plan_of(name)
    figure = plan_figure(plan, 16)
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == len(plan.injections) + (plan.sequence is Sequence.global_and_tiles)
    pixels = to_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 10


def test_a_drawing_names_the_plan_its_groups_and_what_was_dropped():
    shown = texts(plan_figure(plan_of("dropped"), 16))
    assert "16 tokens of context hold 80 visual tokens an image" in shown
    assert plan_of("dropped").digest in shown
    assert "dropped beyond the depth: group 2 -> llm layer 12" in shown
    assert "group 1" in shown
    assert "no injections: nothing is stacked" in texts(plan_figure(plan_of("baseline"), 16))


def test_the_little_mosaic_deals_each_group_as_many_tokens():
    figure = plan_figure(plan_of("long"), 16)
    cells = [to_hex(p.get_facecolor()) for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert sorted(cells.count(colour) for colour in set(cells)) == [16, 16, 16, 16]


def test_a_page_shows_what_was_said_and_what_was_meant_where_it_is_wrong():
    view = np.full((8, 8, 3), 0.5)
    facts = ("red", "teal", "gold", "navy")
    figure = page_figure(
        PAGE,
        view,
        prompt="Which colours?",
        prediction="red blue gold",
        answer=" ".join(facts),
        facts=facts,
        correct=(True, False, True, False),
        title="page 3",
    )
    shown = texts(figure).splitlines()
    assert {"red", "blue", "teal", "gold", "(nothing)", "navy", "Which colours?"} <= {line.strip() for line in shown}
    assert shown.count("red") == 1
    assert any("2 of 4 right" in line for line in shown)
    assert len(figure.axes) == 3
    assert to_pixels(figure).std() > 10


def test_a_page_without_its_view_and_with_one_long_fact_is_drawn_too():
    figure = page_figure(
        PAGE, None, prompt="What is it?", prediction="a " * 100, answer="a dog", facts=("a dog",), correct=(False,)
    )
    assert len(figure.axes) == 2
    assert "a dog" in texts(figure)
    to_pixels(figure)


def test_words_beyond_the_facts_are_not_hidden():
    figure = page_figure(
        PAGE,
        None,
        prompt="",
        prediction="red teal gold",
        answer="red teal",
        facts=("red", "teal"),
        correct=(True, True),
    )
    assert "and then: gold" in texts(figure)
    assert "all facts right, answer not exact" in texts(figure)


def test_drawing_leaves_pyplot_alone():
    plan_figure(plan_of("l"), 16)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
