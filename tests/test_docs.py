"""What docs/ say can be typed, and which tests they say hold what."""

import fnmatch
import re
from itertools import chain
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from deepstack_pl.config.load import from_hydra, register
from deepstack_pl.multimodal.config import build_plan

ROOT = Path(__file__).parents[1]
PLANS = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
PARITY = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
CONTROLS = [
    typed
    for row in re.findall(r"^\| (`(?:model|projector)[=.].*?) \|", PLANS, re.M)
    for typed in re.findall(r"`([^`]+)`", row)
]
ROWS = dict(re.findall(r"^\| (E\d+) (\|.*)$", PARITY, re.M))


@pytest.mark.parametrize("typed", CONTROLS)
def test_every_control_composes_to_a_plan(typed: str) -> None:
    overrides = [*typed.split(), "data.fine_print.view_size=${vision.image_size}"]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = from_hydra(compose("train", overrides))
    assert build_plan(run.model, run.llm, run.vision).name == run.model.name


def test_the_controls_are_all_there() -> None:
    named = {typed.split()[0] for typed in CONTROLS}
    options = {f"model={file.stem}" for file in (ROOT / "conf" / "model").glob("*.yaml")}
    plain = {f"model={name}" for name in ("baseline", "deepstack_l", "deepstack_l_hd", "deepstack_lv", "long_context")}
    assert options - plain <= named


def test_every_row_of_the_published_bugs_has_its_test() -> None:
    assert list(ROWS) == [f"E{number}" for number in range(1, 26)]
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "parity").glob("test_*.py"))
    named = {
        f"E{number}" for name in re.findall(r"def test((?:_e\d+)+)_", source) for number in re.findall(r"e(\d+)", name)
    }
    for row, text in ROWS.items():
        files = re.findall(r"`(tests/[\w/]+\.py)`", text)
        assert row in named or files, (
            f"{row}: docs/parity.md names no test, and none of tests/parity is called after it"
        )
        assert all((ROOT / file).is_file() for file in files), row


def test_the_cases_that_are_named_are_those_that_are_stored() -> None:
    stored = {folder.name for folder in (ROOT / "tests" / "golden" / "cases").iterdir()}
    named = {case: fnmatch.filter(stored, case) for case in re.findall(r"`([lv]_\w*\*?)`", PARITY)}
    assert all(named.values()), named
    assert {*chain(*named.values())} == stored
    assert f"for {len(stored)} cases" in " ".join(PARITY.split())


def test_sections_of_the_method_that_comments_cite_are_there() -> None:
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    files = [
        file
        for room in ("src", "tests", "docs", "conf")
        for file in (ROOT / room).rglob("*")
        if file.suffix in (".py", ".md", ".yaml")
    ]
    cited = {
        section
        for file in files
        for section in re.findall(r"[Mm]ethod ([A-F]\.?\d?)\b", file.read_text(encoding="utf-8"))
    }
    assert {"A.3", "A.7", "B.4"} <= cited
    for section in sorted(section for section in cited if section[0] != "E"):  # its rows stand in parity.md
        heading = rf"\*\*.*{re.escape(section)}\b.*\*\*" if "." in section else rf"^## {section}\."
        assert re.search(heading, method, re.M), section
