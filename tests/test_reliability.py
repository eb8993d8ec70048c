"""docs/reliability.md: every row is held by a test that exists and runs, or says why there is none."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
SECTIONS = {
    title: [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if re.match(r"\| (?!#)", line)
    ]
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((TESTS / file).read_text())
    return {each.name: each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}  # in classes, too


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: value)
def test_a_named_test_exists_and_is_not_skipped(file: str, name: str) -> None:
    assert (TESTS / file).is_file()
    assert name in functions(file)
    marks = [ast.unparse(each) for each in functions(file)[name].decorator_list]
    assert not re.search(r"\b(skip|skipif|xfail)\b", " ".join(marks)), marks


@pytest.mark.parametrize(
    ("title", "numbers"),
    [
        ("DeepStack elsewhere: 41 failure modes", [str(each) for each in range(1, 42)]),
        ("Training at large: 52 faults", [str(each) for each in range(1, 53)]),
        ("Properties", [f"P{each}" for each in range(1, 5)]),
        ("What users of other frameworks complain about: 15 themes", [f"T{each}" for each in range(1, 16)]),
    ],
)
def test_no_row_is_left_out(title: str, numbers: list[str]) -> None:
    assert [row[0] for row in SECTIONS[title]] == numbers


@pytest.mark.parametrize(
    "row", [row for rows in SECTIONS.values() for row in rows if len(row) == 4], ids=lambda row: row[0]
)
def test_a_row_is_held_by_a_test_or_says_why_by_none(row: list[str]) -> None:
    _, fault, here, held = row
    assert fault
    assert here
    if not re.search(r"`[\w/]+\.py::\w+`", held):
        assert re.match(r"(cannot occur|not promised|by hand): \S", held), held
