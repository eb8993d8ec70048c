"""Every experiment that is shipped can be run, at every point of its sweep, and is the one that its page shows."""

import difflib
import re
import shlex
from pathlib import Path

import pytest
from shipped import CONF, PAGES, Point, chooses, command_of, header_of, names, page, page_of, points, run_of

from deepstack_pl.cli import checks
from deepstack_pl.cli.train import main
from deepstack_pl.config.overrides import check, parse
from deepstack_pl.config.schema import Schema
from deepstack_pl.multimodal.config import build_plan

ROOT = CONF.parent
SCHEMA = Schema((CONF,))
EXPERIMENTS = names()
PAPER = [name for name in EXPERIMENTS if name.startswith("paper/")]


def last_point(name: str) -> Point:
    """The deepest start, the widest grid: where a plan would break first."""
    return points(name)[-1]


def hold_together(name: str, point: Point) -> None:
    run = run_of(name, point)
    checks.check(run)
    plan = build_plan(run.model, run.llm, run.vision)
    assert bool(plan.injections) is bool(run.model.groups or run.model.injections), point


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_points_that_change_values_compose_and_hold_together(name: str) -> None:
    hold_together(name, ())
    for point in points(name):
        if not chooses(point):
            hold_together(name, point)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if any(map(chooses, points(name)))])
def test_points_that_choose_options_compose_and_hold_together(name: str) -> None:
    for point in points(name):
        hold_together(name, point)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_two_points_are_the_same_run(name: str) -> None:
    runs = [run_of(name, point) for point in points(name)]
    assert all(one != other for place, one in enumerate(runs) for other in runs[:place])


def differences(name: str, shown: str, found: str) -> str:
    lines = difflib.unified_diff(shown.splitlines(), found.splitlines(), "shown", "is", lineterm="", n=1)
    changed = "\n".join(lines)
    return changed and f"{page_of(name).name} is of another run; if that is meant: make golden\n{changed}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_page_shows_its_values(name: str) -> None:
    shown = page_of(name).read_text(encoding="utf-8") if page_of(name).is_file() else ""
    head = re.sub(r"^(points:.*?\n).*", r"\1", shown, flags=re.M | re.S)
    assert not differences(name, head, page(name, whole=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_page_shows_its_points(name: str) -> None:
    assert not differences(name, page_of(name).read_text(encoding="utf-8"), page(name))


def test_every_page_is_of_an_experiment() -> None:
    assert set(PAGES.glob("*.yaml")) == {page_of(name) for name in EXPERIMENTS}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_that_it_gives_is_its_own(name: str) -> None:
    words = shlex.split(command_of(name).split("; ")[-1])
    assert words[:2] == ["python", "train.py"]
    given = [word for word in words[2:] if word != "-m"]
    assert f"experiment={name}" in given
    check(parse(given), SCHEMA)


@pytest.mark.parametrize("name", PAPER)
def test_a_file_of_the_paper_says_what_is_published_and_what_was_chosen(name: str) -> None:
    header = header_of(name)
    for word in ("Question:", "Claim", "Recipe:", "Open:", "Cost:", "Command:"):
        assert re.search(rf"^{word}", header, re.M), word
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert sum(not line.startswith("#") for line in text) <= 25
    assert max(map(len, text)) <= 120
    if "fig3" in name:
        assert "Third-party readings of the figure, unverified" in header


def test_the_table_of_the_paper_has_every_file() -> None:
    table = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(paper/\w+)` \|", table, re.M)) == PAPER


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_dry_run_of_one_point_says_what_it_will_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(CONF, [f"experiment={name}", *last_point(name), "hydra.mode=RUN", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "what learns" in said
    assert "A step:" in said
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
