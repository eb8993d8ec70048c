"""Parity says so where something differs: one golden case, spoiled in one place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from copies import GOLDEN, copy_of, edit, failed, spoil, with_more, with_value
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import deepstack_pl.inspection.parity as parity
import deepstack_pl.stacking.mosaic as mosaic
from deepstack_pl.inspection.measured import Quantity, measure
from deepstack_pl.inspection.parity import run_case


def spoiled(tmp_path: Path, key: str, change: Callable[[Tensor], Tensor], case: str = "l_default") -> list[str]:
    """What fails once one stored output is changed."""
    folder = copy_of(tmp_path, case)
    spoil(folder / "cases" / case / "outputs.safetensors", key, change)
    return failed(run_case(folder, case))


def test_another_start_layer_shows_in_the_first_layer_it_changes(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_default")
    edit(folder / "cases" / "l_default" / "config.json", deepstack_start_id=2)
    wrong = failed(run_case(folder, "l_default"))
    assert wrong[0] == "layer_input.1"
    assert {"layer_input.7", "logits", "loss", "grad.model.mm_projector.0.weight"} <= set(wrong)


def test_two_groups_in_each_others_place_show(monkeypatch: pytest.MonkeyPatch) -> None:
    deal = mosaic.deal
    monkeypatch.setattr(mosaic, "deal", lambda *args: deal(*args)[[1, 0, *range(2, len(deal(*args)))]])
    assert failed(run_case(GOLDEN, "l_default"))[0] == "layer_input.1"


def test_a_scaled_weight_shows_behind_its_layer(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    weights = folder / "checkpoints" / "llama_8layers" / "model.safetensors"
    spoil(weights, "model.layers.3.mlp.up_proj.weight", lambda weight: 1.001 * weight)
    assert failed(run_case(folder, "l_start0"))[0] == "layer_input.4"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stored_logit_that_is_no_number_is_no_agreement(value: float, tmp_path: Path) -> None:
    assert spoiled(tmp_path, "logits", with_value(value, 0, 3, 5)) == ["logits"]


def test_two_nans_do_not_agree(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    nan = with_value(float("nan"), 0)
    spoil(folder / "checkpoints" / "llama_8layers" / "model.safetensors", "lm_head.weight", nan)
    outputs = folder / "cases" / "l_start0" / "outputs.safetensors"
    spoil(outputs, "logits", with_value(float("nan"), slice(None), slice(None), 0))  # pyright: ignore
    spoil(outputs, "loss", nan)
    assert failed(run_case(folder, "l_start0")) == ["logits", "loss"]


def test_what_padding_holds_is_not_compared(tmp_path: Path) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor[1, 30:] = float("nan")  # the second sample ends at 26
        return tensor

    assert spoiled(tmp_path, "logits", change) == []


def test_a_stored_sample_that_is_longer_than_ours_shows(tmp_path: Path) -> None:
    assert spoiled(tmp_path, "layer_input.0", with_value(0.5, 1, 26, 0)) == ["layer_input.0"]


def test_a_batch_of_another_length_shows(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_truncated")
    edit(folder / "cases" / "l_truncated" / "config.json", tokenizer_model_max_length=25)
    rows = [row for row in run_case(folder, "l_truncated").rows if not row.ok]
    assert {"layer_input.0", "logits"} <= {row.name for row in rows}
    assert "its shape is [1, 25, 48], stored is [1, 24, 48]" in rows[0].reason


def test_a_newline_that_is_not_added_again_with_every_group_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    read = parity.read_config

    def without(*args, **kwargs):
        config = read(*args, **kwargs)
        config.plan["newline"] = "rows"
        return config

    monkeypatch.setattr(parity, "read_config", without)
    assert failed(run_case(GOLDEN, "l_hd_anyres"))[0] == "layer_input.1"


def test_a_checkpoint_without_its_newline_is_an_error(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_hd_truncated")
    weights = folder / "checkpoints" / "llama_8layers_newline" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "model.image_newline"}, weights)
    assert "image_newline" in run_case(folder, "l_hd_truncated").error


@pytest.mark.parametrize("sample", [0, 2])
def test_another_greedy_id_shows(sample: int, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_default")
    file = folder / "cases" / "l_default" / "meta.json"
    greedy = json.loads(file.read_text())["greedy"]
    greedy[sample][-1] += 1
    edit(file, greedy=greedy)
    assert failed(run_case(folder, "l_default")) == [
        f"greedy of sample {sample}",
        f"greedy of sample {sample} in a batch",
    ]


def test_a_gradient_that_is_off_shows_with_its_part(tmp_path: Path) -> None:
    key = "model.mm_projector.2.weight"
    folder = copy_of(tmp_path, "l_default")
    spoil(folder / "cases" / "l_default" / "outputs.safetensors", f"grad.{key}", with_more(1e-3, 4, 7))
    rows = [row for row in run_case(folder, "l_default").rows if not row.ok]
    assert [(row.name, row.part) for row in rows] == [(f"grad.{key}", "projector")]
    assert "axis 0 at 4, axis 1 at 7" in rows[0].reason


def test_gradients_have_a_relative_bound_but_for_the_keys_bias_of_the_tower(tmp_path: Path) -> None:
    stem = "grad.model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn."
    assert spoiled(tmp_path / "a", f"{stem}v_proj.weight", lambda g: g * (1 + 5e-5)) == []
    assert spoiled(tmp_path / "b", f"{stem}k_proj.bias", with_more(5e-7, 0)) == []
    assert spoiled(tmp_path / "c", f"{stem}k_proj.bias", with_more(2e-6, 0)) == [f"{stem}k_proj.bias"]
    bound = measure(Quantity.gradients, "g", torch.tensor([1.00005]), torch.tensor([1.0]), 1e-6, ("at",))
    assert not bound.ok


def test_a_stored_gradient_that_we_have_not_shows(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_default")
    file = folder / "cases" / "l_default" / "outputs.safetensors"
    added = ["grad.model.layers.3.self_attn.q_proj.bias", "grad.model.layers.11.self_attn.q_proj.weight"]
    save_file({**load_file(file), **{key: torch.zeros(48) for key in added}}, file)
    assert sorted(failed(run_case(folder, "l_default"))) == sorted(added)


@pytest.mark.parametrize(("amount", "wrong"), [(1e-4, ["views.1"]), (5e-7, [])])
def test_a_view_that_is_off_shows(amount: float, wrong: list[str], tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    spoil(folder / "cases" / "l_start0" / "inputs.safetensors", "views.1", with_more(amount, 2, 1, 9, 9))
    assert failed(run_case(folder, "l_start0")) == wrong


def test_an_image_without_stored_views_shows(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    file = folder / "cases" / "l_start0" / "inputs.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != "views.1"}, file)
    assert failed(run_case(folder, "l_start0")) == ["views.1"]


def test_a_transparent_picture_is_opened_as_the_published_loader_does(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_small_square")
    file = folder / "cases" / "l_small_square" / "image_0.png"
    with Image.open(file) as picture:
        clear = picture.convert("RGB")
    clear.putalpha(90)
    clear.save(file)
    assert failed(run_case(folder, "l_small_square")) == []


def test_views_in_another_order_show(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_hd_truncated")
    inputs = folder / "cases" / "l_hd_truncated" / "inputs.safetensors"
    spoil(inputs, "views.0", lambda views: views[[*range(5), 6, 5, *range(7, len(views))]])
    assert failed(run_case(folder, "l_hd_truncated")) == ["views.0"]


def test_another_grid_shows(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    edit(folder / "cases" / "l_start0" / "meta.json", grids=[[2, 2], [1, 3], [1, 3]])
    assert failed(run_case(folder, "l_start0")) == ["grids"]


def test_a_loss_that_is_off_shows(tmp_path: Path) -> None:
    assert spoiled(tmp_path, "loss", with_more(1e-5, 0)) == ["loss"]


@pytest.mark.parametrize("key", ["hidden.3", "layer_input.99", "layer_input.last"])
def test_a_stored_quantity_that_cannot_be_compared_is_named(key: str, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    file = folder / "cases" / "l_start0" / "outputs.safetensors"
    save_file({**load_file(file), key: torch.zeros(3)}, file)
    (wrong,) = failed(run_case(folder, "l_start0"))
    assert wrong.startswith(key)


def test_what_meta_says_and_nobody_reads_is_noted(tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    edit(folder / "cases" / "l_start0" / "meta.json", beams=[[1, 2]])
    edit(folder / "cases" / "l_start0" / "config.json", deepstack_gate=0.5)
    result = run_case(folder, "l_start0")
    assert result.ok
    assert result.notes == ("deepstack_gate of config.json is not read", "beams of meta.json is not read")


def broken_json(home: Path) -> None:
    (home / "meta.json").write_text("{")


def broken_tensors(home: Path) -> None:
    (home / "outputs.safetensors").write_bytes(b"\x00" * 40)


def without(*keys: str) -> Callable[[Path], None]:
    """Drop stored outputs that begin so."""

    def drop(home: Path) -> None:
        file = home / "outputs.safetensors"
        save_file({key: value for key, value in load_file(file).items() if not key.startswith(keys)}, file)

    return drop


SPOILED = {
    "lacks logits, loss, layer_input.<number>": without(""),
    "lacks logits:": without("logits"),
    "lacks loss:": without("loss"),
    "lacks layer_input.<number>:": without("layer_input."),
    "there is no such file": lambda home: (home / "outputs.safetensors").unlink(),
    "cannot be read as JSON": broken_json,
    "cannot be read as safetensors": broken_tensors,
    "names the image": lambda home: (home / "image_1.png").unlink(),
    "cannot identify image file": lambda home: (home / "image_1.png").write_text("no picture"),
    "names checkpoint": lambda home: edit(home / "meta.json", checkpoint="checkpoints/other"),
    "no word '3xsample'": lambda home: edit(home / "config.json", deepstack_args_for_ablation="3xsample"),
    "no safetensors": lambda home: (home.parents[1] / "checkpoints/llama_8layers/model.safetensors").unlink(),
    "does not fit config.json": lambda home: edit(home / "config.json", num_hidden_layers=7),
    "1 image placeholders, but 0 images": lambda home: edit(home / "meta.json", images=[None, None, None]),
    "greedy holds 2 entries": lambda home: edit(home / "meta.json", greedy=[[1], [2]]),
    "is 120x40 pixels": lambda home: edit(home / "meta.json", image_sizes=[[60, 50], [40, 120], [33, 90]]),
}


@pytest.mark.parametrize("sentence", SPOILED)
def test_a_malformed_case_is_an_error_in_a_sentence(sentence: str, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "l_start0")
    SPOILED[sentence](folder / "cases" / "l_start0")
    result = run_case(folder, "l_start0")
    assert sentence in result.error
    assert not result.ok
    assert not result.rows


def test_one_number_is_compared_with_its_own_bound() -> None:
    ours, stored = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 3.1])
    row = measure(Quantity.logits, "logits", ours, stored, torch.tensor([1.0, 1.0, 0.01]), ("at",))
    assert (round(row.largest, 3), row.ok, row.count) == (0.5, False, 3)
    assert row.reason.endswith("at at 2")
