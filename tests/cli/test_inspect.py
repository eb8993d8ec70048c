"""``deepstack inspect``: figures and numbers for one picture, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image
from small_run import STACKED, Pages, small_model, small_processor

from deepstack_pl.cli.main import main
from deepstack_pl.stacking.config import ModelConfig


def a_run(folder: Path, config: ModelConfig = STACKED) -> Path:
    small_model(config).save_pretrained(folder)
    small_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    Pages()[0].images[0].save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_it_writes_figures_and_all_numbers(tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    words = ["--image", str(page), "--prompt", "Which colours?", "--answer", "red teal"]
    assert main(["inspect", str(run), *words]) == 0
    folder = run / "inspect" / "page"
    names = (
        "plan",
        "dealt",
        "injections_left_out",
        "injections_in_the_stream",
        "attention_visual_share",
        "attention_map",
    )
    for name in names:
        assert Image.open(folder / f"{name}.png").width > 300
    said = json.loads((folder / "inspect.json").read_text())
    assert (said["prompt"], said["answer"], len(said["effects"])) == ("Which colours?", "red teal", 4)
    out = capsys.readouterr().out
    assert "llm layer 02 group 1: " in out
    assert "without any injection" in out


def test_a_plan_without_injections_says_so(tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", ModelConfig(name="baseline", tiles=0, groups=0))
    assert main(["inspect", str(run), "--image", str(page), "--prompt", "Which?", "--answer", "red"]) == 0
    assert "nothing is stacked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "image", "prompt", "why"),
    [
        ("nowhere", "page.png", "Which?", "no model lies there"),
        ("run", "none.png", "Which?", "there is no such file"),
        ("run", "page.png", "  ", "--prompt is empty"),
        ("run", "text.png", "Which?", "cannot read this image"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_a_sentence(
    run: str, image: str, prompt: str, why: str, tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "run")
    (tmp_path / "text.png").write_text("no picture")
    assert main(["inspect", str(tmp_path / run), "--image", str(tmp_path / image), "--prompt", prompt]) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "run" / "inspect").exists()
