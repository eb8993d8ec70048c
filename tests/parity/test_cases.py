"""Parity with the published code (tests/golden/README.md), at other sizes too, and the command that shows it.

Worst differences seen: views 0, layer inputs 5.7e-6, logits 3.2e-6, loss 9.5e-7, gradients 3.4e-7.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from copies import GOLDEN, complaints, copy_of, edit, failed, spoil, with_more, with_value
from other_sizes import AFTER_THE_LAST, OTHER_SIZES
from safetensors.torch import load_file

from deepstack_pl.cli.main import main
from deepstack_pl.inspection.measured import Quantity
from deepstack_pl.inspection.parity import cases_of, run_case

CASES = cases_of(GOLDEN)
# As the README marks them: g, s.
WITH_GRADIENTS = {"l_default", "l_text_only", "l_hd_anyres", "l_phi3_default", "v_start3"}
WITH_ANSWERS = {"l_default", "l_start2_interval2", "l_2xsample", "l_hd_anyres", "l_phi3_default"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_every_published_case_is_equal(case: str, attention: str) -> None:
    result = run_case(GOLDEN, case, attention=attention)
    assert result.ok, complaints(result)
    assert not result.notes
    stored = {*load_file(GOLDEN / "cases" / case / "outputs.safetensors")}
    views = {key for key in load_file(GOLDEN / "cases" / case / "inputs.safetensors") if key.startswith("views.")}
    images = json.loads((GOLDEN / "cases" / case / "meta.json").read_text())["images"]
    views -= {f"views.{row}" for row, image in enumerate(images) if image is None}
    compared = {row.name for row in result.rows}
    assert {name for name in compared if not name.startswith(("greedy", "grids"))} == stored | views
    assert "grids" in compared
    assert ("greedy of sample 0 in a batch" in compared) == (case in WITH_ANSWERS)
    assert any(row.quantity is Quantity.gradients for row in result.rows) == (case in WITH_GRADIENTS)


def test_every_case_that_the_readme_lists_is_here() -> None:
    readme = (GOLDEN / "README.md").read_text()
    assert len(CASES) == 24
    assert all(f"`{case}`" in readme for case in CASES)


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_a_folder_of_other_sizes_is_equal(name: str, tmp_path: Path) -> None:
    OTHER_SIZES[name]().write(tmp_path)
    result = run_case(tmp_path, name)
    assert result.ok, complaints(result)


@pytest.mark.parametrize("name", AFTER_THE_LAST)
def test_no_group_is_added_behind_the_towers_last_layer(name: str, tmp_path: Path) -> None:
    AFTER_THE_LAST[name]().write(tmp_path)
    result = run_case(tmp_path, name)
    assert result.ok, complaints(result)


def test_a_model_of_other_sizes_with_another_activation_or_epsilon_is_not_equal(tmp_path: Path) -> None:
    OTHER_SIZES["plain"]().write(tmp_path)
    for key, value in {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}.items():
        edit(tmp_path / "small_tower" / "config.json", **{key: value})
        assert "layer_input.0" in failed(run_case(tmp_path, "plain"))
        OTHER_SIZES["plain"]().write(tmp_path)


# The command


def run(*words: str) -> int:
    return main(["parity", *words])


def test_the_command_says_how_far_apart_everything_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    assert run(str(GOLDEN), "--case", "l_default", "--case", "l_truncated", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "2 cases: 2 equal the published code" in out
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.partition("gradients by part")[0].splitlines())
    written = json.loads(file.read_text())
    assert [case["case"] for case in written["cases"]] == ["l_default", "l_truncated"]
    assert {row["quantity"] for row in written["cases"][0]["rows"]} == {
        "grids",
        "views",
        "layer inputs",
        "logits",
        "loss",
        "gradients",
        "greedy",
    }


def test_the_command_names_what_differs_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for case in ("l_default", "l_start0", "l_small_square"):
        shutil.copytree(GOLDEN / "cases" / case, tmp_path / "cases" / case)
    for part in ("checkpoints/llama_8layers", "vision_tower"):
        shutil.copytree(GOLDEN / part, tmp_path / part)
    spoil(tmp_path / "cases" / "l_default" / "outputs.safetensors", "logits", with_value(float("nan"), 0, 3, 5))
    (tmp_path / "cases" / "l_small_square" / "inputs.safetensors").unlink()
    file = tmp_path / "parity.json"
    assert run(str(tmp_path), "--json", str(file)) == 1
    out = capsys.readouterr().out
    assert "l_default: logits: NaN" in out.replace("nan", "NaN")
    assert "sample 0, position 3, id 5" in out
    assert "l_small_square: error:" in out
    assert "3 cases: 1 equal the published code, 1 differ, 1 could not be run" in out
    assert json.loads(file.read_text())["ok"] is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["nowhere"], "there are no cases"), ([str(GOLDEN), "--case", "l_defualt"], "has no such case")],
)
def test_a_folder_without_such_a_case_is_an_error(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_exit_status_tells_whether_all_is_equal(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_small_square")
    shutil.copytree(GOLDEN / "cases" / "l_start0", folder / "cases" / "l_start0")
    spoil(folder / "cases" / "l_small_square" / "outputs.safetensors", "logits", with_more(1e-3, 0, 0, 0))
    assert run(str(folder), "--case", "l_start0") == 0
    words = [sys.executable, "-c", "from deepstack_pl.cli.main import entry; entry()", "parity", str(folder)]
    done = subprocess.run([*words, "--case", "l_start0", "--case", "l_small_square"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "l_small_square: logits" in done.stdout


def test_a_file_that_cannot_be_written_is_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(str(GOLDEN), "--case", "l_small_square", "--json", str(tmp_path / "file" / "parity.json")) == 1
    assert "Name a file in a folder that is there" in capsys.readouterr().err
