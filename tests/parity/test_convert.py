"""Conversion of published checkpoints: replicas with the published names, and the golden checkpoints."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import replica
import torch
from PIL import Image
from replica import TOWER_NAME, Replica, index_bytes, write
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepstack_pl.batch import PadSide, collate
from deepstack_pl.cli.main import main
from deepstack_pl.language.config import LLMConfig, TooLong
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.convert import convert, convert_back
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor, generation_inputs
from deepstack_pl.multimodal.published.files import checkpoint_folder
from deepstack_pl.multimodal.published.keys import rename_to_ours, rename_to_published
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.multimodal.tensor_files import TensorFiles, write_tensors
from deepstack_pl.stacking.config import Host, ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "text" / "tokenizer"
SMALL = Replica(layers=8, tower_layers=6)  # where the names are not the point
REPLICAS = {
    "l": Replica(),
    "l_hd": Replica(hd=True),
    "phi3": Replica(host="phi3"),
    "v_appended": Replica(appended=True),
    "tied": Replica(tied=True),
}


def silent(line: str) -> None:
    """No report."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def json_of(file: Path) -> dict:
    return json.loads(file.read_text())


def failing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command fails."""
    assert main(argv) == 1
    text = capsys.readouterr().err.strip()
    assert text, "it says nothing"
    assert "\n" not in text, "more than a sentence"
    return text


def left_behind(folder: Path, before: set[str]) -> set[str]:
    return {path.name for path in folder.iterdir()} - before


@pytest.mark.parametrize(("name", "count"), [("l", 686), ("l_hd", 687), ("v_appended", 686 + 80), ("tied", 685)])
def test_a_replica_has_as_many_tensors_as_the_published_checkpoint(name: str, count: int) -> None:
    assert len(REPLICAS[name].shapes()) == count


def test_the_replicas_names_fill_the_published_index_to_the_byte() -> None:
    """Method F: 73,152 bytes, 73,215 with the newline; a misspelt name would be another number."""
    assert index_bytes(REPLICAS["l"], 14_126_000_000) == 73_152
    assert index_bytes(REPLICAS["l_hd"], 14_126_000_000) == 73_215


@pytest.mark.parametrize("name", REPLICAS)
def test_every_tensor_arrives_and_goes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    replica = REPLICAS[name]
    source = replica.write(tmp_path / "source")
    before = tensors_of(source)
    lines: list[str] = []
    convert(str(source), tmp_path / "ours", report=lines.append)
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.dtype is torch.bfloat16
    state = {key: tensor for key, tensor in model.state_dict().items() if not (replica.tied and "lm_head" in key)}
    renamed = rename_to_published(state, model.config)
    assert renamed.keys() == before.keys()
    assert all(same_bytes(renamed[key], before[key]) for key in before)
    assert any(f"tensors: {len(before)} read, {len(state)} written (bfloat16)" in line for line in lines)

    convert_back(str(tmp_path / "ours"), tmp_path / "back", report=silent)
    after = tensors_of(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(same_bytes(after[key], before[key]) for key in before)
    assert json_of(tmp_path / "back" / "config.json") == json_of(source / "config.json")


def test_queries_keys_and_values_are_joined_in_this_order(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    convert(str(source), tmp_path / "ours", report=silent)
    published, ours = tensors_of(source), tensors_of(tmp_path / "ours")
    stem = "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn."
    joined = torch.cat([published[f"{stem}{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(ours["vision_tower.tower.visual.transformer.resblocks.3.attn.in_proj_weight"], joined)


def test_appended_layers_are_the_towers_last(tmp_path: Path) -> None:
    source = REPLICAS["v_appended"].write(tmp_path / "source")
    convert(str(source), tmp_path / "ours", report=silent)
    config = DeepStackConfig.from_pretrained(tmp_path / "ours")
    vision, plan = config.typed_vision(), config.typed_plan()
    assert (vision.layers, vision.tap) == (29, 29)
    assert [i.layer for i in plan.injections if i.host is Host.vit] == [24, 25, 26, 27]
    published, ours = tensors_of(source), tensors_of(tmp_path / "ours")
    theirs = published["model.vision_tower.post_encoder.0.mlp.fc1.weight"]
    assert torch.equal(ours["vision_tower.tower.visual.transformer.resblocks.24.mlp.c_fc.weight"], theirs)


def test_towers_spelt_as_transformers_5_does_are_read(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source", spelt=lambda name: name.replace(".vision_model.", "."))
    convert(str(source), tmp_path / "ours", report=silent)
    plain = SMALL.write(tmp_path / "plain")
    convert(str(plain), tmp_path / "same", report=silent)
    ours, same = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "same")
    assert all(same_bytes(ours[name], same[name]) for name in ours.keys() | same.keys())


def test_values_of_the_host_survive(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    source = SMALL.write(tmp_path / "source", rope_theta=300.0, rope_scaling=scaling, rms_norm_eps=1e-3)
    convert(str(source), tmp_path / "ours", report=silent)
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours")
    expected = 1 / 300 ** (torch.arange(0, 4, 2) / 4) / 2
    torch.testing.assert_close(model.get_decoder().rotary_emb.inv_freq, expected)
    assert model.get_decoder().norm.variance_epsilon == 1e-3
    convert_back(str(tmp_path / "ours"), tmp_path / "back", report=silent)
    assert json_of(tmp_path / "back" / "config.json")["rope_scaling"] == scaling


# What is wrong with a checkpoint, and what the error names.
Spoil = Callable[[Path], None]


def change(name: str, to: Callable[[dict[str, Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        shard = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
        tensors = load_file(shard)
        to(tensors)
        save_file(tensors, shard)
        index = json_of(folder / "model.safetensors.index.json")
        places = {n: file for n, file in index["weight_map"].items() if file != shard.name}
        index["weight_map"] = {**places, **dict.fromkeys(tensors, shard.name)}
        write(folder / "model.safetensors.index.json", index)

    return spoil


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.image_newline"] = torch.zeros(16)
    tensors.update({f"model.stray.{number}": torch.zeros(1) for number in range(9)})


def set_config(**values: object) -> Spoil:
    return lambda folder: write(folder / "config.json", {**json_of(folder / "config.json"), **values})


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def move_in_the_index(folder: Path) -> None:
    index = json_of(folder / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    write(folder / "model.safetensors.index.json", index)


def number_the_shards(folder: Path) -> None:
    index = json_of(folder / "model.safetensors.index.json")
    index["weight_map"] = dict.fromkeys(index["weight_map"], 5)
    write(folder / "model.safetensors.index.json", index)


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


NORM = "model.norm.weight"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "a tensor too many": (change(NORM, add), "10 left over: model.image_newline, model.stray.0, "),
    "a tensor missing": (change(NORM, lambda t: t.pop(NORM)), f"1 missing: {NORM}"),
    "another shape": (
        change(NORM, lambda t: t.update({NORM: torch.zeros(17)})),
        f"1 of another shape: {NORM} (17,), expected (16,)",
    ),
    "another vocabulary": (set_config(vocab_size=705), "lm_head.weight (704, 16), expected (705, 16)"),
    "two dtypes in one tensor": (
        change(
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
            lambda t: t.update(
                {name: v.float() for name, v in t.items() if name.endswith("layers.0.self_attn.q_proj.bias")}
            ),
        ),
        "of different dtypes (bfloat16, float32)",
    ),
    "a truncated shard": (truncate, "model-00002-of-00003.safetensors is no whole safetensors file"),
    "a missing shard": (
        lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(),
        "3 shards, and 1 of them cannot be found: model-00003-of-00003.safetensors",
    ),
    "an index of other places": (move_in_the_index, "disagree about 1 tensors, the first being lm_head.weight"),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "holds 3 safetensors files without model.safetensors.index.json",
    ),
    "pickles": (only_pickles, "holds its weights as .bin"),
    "no weights": (lambda folder: [f.unlink() for f in folder.glob("*.safetensors*")], "holds no safetensors"),
    "a word that is none": (
        set_config(deepstack_args_for_ablation="2xsample+dumy_local"),
        "the published code has no word 'dumy_local'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "another model": (set_config(model_type="llava_llama"), "model_type='llava_llama'"),
    "the tower's folder on another machine": (
        set_config(mm_vision_tower="/models/clip"),
        "no name on a hub either. Give the folder with the tower's config.json: --vision-tower FOLDER",
    ),
    "an activation that is none": (set_config(hidden_act="silo"), "no such model can be built (KeyError: 'silo')"),
    "a vocabulary of nothing": (set_config(vocab_size=0), "no such model can be built (IndexError: "),
    "no layers": (set_config(num_hidden_layers=None), "transformers refuses its values for a llama"),
    "an index of numbers": (number_the_shards, "names 5 as a file"),
    "tied, but two tensors": (
        set_config(tie_word_embeddings=True),
        "lm_head.weight is model.embed_tokens.weight, but two different tensors are stored",
    ),
    "an unknown tower": (set_config(mm_vision_tower="nobody/knows-it"), "mm_vision_tower 'nobody/knows-it'"),
    "OpenAI's tower, of another size": (
        set_config(mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024),
        "missing: model.vision_tower.vision_tower.vision_model.encoder.layers.10",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_refused_by_name_and_nothing_is_left(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = SPOILT[what]
    source = SMALL.write(tmp_path / "source")
    spoil(source)
    before = {path.name for path in tmp_path.iterdir()}
    assert said in failing(["convert", str(source), str(tmp_path / "ours")], capsys)
    assert left_behind(tmp_path, before) == set()


def test_a_destination_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SMALL.write(tmp_path / "source")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    assert "is there already, and not empty" in failing(["convert", str(source), str(tmp_path / "ours")], capsys)
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]
    (tmp_path / "ours" / "mine.txt").unlink()
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0


def test_tied_embeddings_that_are_stored_twice_are_read_once(tmp_path: Path) -> None:
    replica, lines = Replica(layers=8, tower_layers=6, tied=True), []
    tensors = replica.tensors()
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    source = replica.write(tmp_path / "source", tensors={**tensors, **head})
    convert(str(source), tmp_path / "ours", report=lines.append)
    assert any(line.startswith("lm_head.weight is stored, but tied to model.embed_tokens.weight") for line in lines)
    convert_back(str(tmp_path / "ours"), tmp_path / "back", report=silent)
    assert tensors_of(tmp_path / "back").keys() == tensors.keys()


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "VOCABULARY", 698)
    source = SMALL.write(tmp_path / "source")
    before = {path.name for path in tmp_path.iterdir()}
    text = failing(["convert", str(source), str(tmp_path / "ours"), "--tokenizer", str(TOKENIZER)], capsys)
    assert "The tokenizer has 2 tokens beyond vocab_size=698" in text
    assert left_behind(tmp_path, before) == set()
    monkeypatch.setattr(replica, "VOCABULARY", 700)  # <image> is 700
    convert(str(SMALL.write(tmp_path / "fits")), tmp_path / "ours", tokenizer=str(TOKENIZER), report=silent)


def test_a_towers_description_is_fetched_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        fetched.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("deepstack_pl.multimodal.published.files.snapshot_download", fetch)
    assert checkpoint_folder("somebody/model") == tmp_path
    assert {"vision_tower/*.json", "config.json", "*.safetensors"} <= set(fetched)


def test_a_disk_that_fills_up_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    source = SMALL.write(tmp_path / "source")
    monkeypatch.setattr("deepstack_pl.multimodal.tensor_files.save_file", full)
    text = failing(["convert", str(source), str(tmp_path / "ours")], capsys)
    assert "model.safetensors cannot be written" in text
    assert "No space left on device" in text


def test_printed_commands_can_be_pasted(tmp_path: Path) -> None:
    lines: list[str] = []
    convert(str(SMALL.write(tmp_path / "source")), tmp_path / "my model", report=lines.append)
    assert any(f"deepstack convert '{tmp_path}/my model' FOLDER" in line for line in lines)
    assert any(f"train.py 'init_from={tmp_path}/my model' model=" in line for line in lines)


def test_another_template_than_the_hosts_is_named_on_the_way_back(tmp_path: Path) -> None:
    source, lines = str(SMALL.write(tmp_path / "source")), []
    for template, named in (("plain", 1), (None, 0)):
        convert(source, tmp_path / f"{template}", template=template, report=silent)
        lines.clear()
        convert_back(str(tmp_path / f"{template}"), tmp_path / f"back_{template}", report=lines.append)
        assert sum("convert again with --template plain" in line for line in lines) == named


def test_a_hub_name_without_a_network_says_how_to_fetch_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = failing(["convert", "menglc/deepstack-l-vicuna-7b", str(tmp_path / "ours")], capsys)
    assert "`hf download menglc/deepstack-l-vicuna-7b --local-dir FOLDER`" in text
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_direction_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SMALL.write(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    again = failing(["convert", str(tmp_path / "ours"), str(tmp_path / "twice")], capsys)
    assert "in this project's format already. `--to published` takes it back" in again
    back = failing(["convert", str(source), str(tmp_path / "back"), "--to", "published"], capsys)
    assert "is a 'deepstack_llama', not a model of this project" in back
    idle = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published", "--template", "plain"]
    assert "--template with --to published" in failing(idle, capsys)


def test_the_command_reports_what_it_read_and_what_it_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SMALL.write(tmp_path / "source", deepstack_start_id=6, mm_colour="blue", hires=True)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    text = capsys.readouterr().out
    assert "llama, 8 layers" in text
    assert f"plan deepstack_l ({DeepStackConfig.from_pretrained(tmp_path / 'ours').typed_plan().digest})" in text
    assert "dropped beyond the depth: group 2 -> llm layer 8" in text
    assert "not read, but kept for the way back: mm_colour" in text
    assert "tokenizer: the checkpoint holds none" in text
    assert "init_from=" in text


@pytest.mark.parametrize("where", ["beside", "inside", "given", "of the back"])
def test_the_towers_configuration_is_found(where: str, tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    beside = tmp_path / TOWER_NAME
    match where:
        case "inside":
            beside.rename(source / TOWER_NAME)
        case "given":
            beside.rename(tmp_path / "elsewhere")
        case "of the back":
            convert(str(source), tmp_path / "first", report=silent)
            convert_back(str(tmp_path / "first"), tmp_path / "back", report=silent)
            shutil.rmtree(beside)
            source = tmp_path / "back"
    given = str(tmp_path / "elsewhere") if where == "given" else None
    convert(str(source), tmp_path / "ours", vision_tower=given, report=silent)
    assert DeepStackConfig.from_pretrained(tmp_path / "ours").vision["layers"] == 6


# The published loader takes the tower from elsewhere (method E6); here it is the checkpoint's.
def test_the_towers_weights_are_the_checkpoints(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    save_file({"strange": torch.ones(1)}, tmp_path / TOWER_NAME / "model.safetensors")
    convert(str(source), tmp_path / "ours", report=silent)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    ours = tensors_of(tmp_path / "ours")["vision_tower.tower.visual.class_embedding"]
    assert torch.equal(ours, tensors_of(source)[name])


def test_a_tokenizer_comes_along_and_goes_back_as_it_was(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, source)
    convert(str(source), tmp_path / "ours", report=silent)
    processor = DeepStackProcessor.from_pretrained(tmp_path / "ours")
    assert processor.template.name == "vicuna_v1"
    assert processor.image_token_id == DeepStackConfig.from_pretrained(tmp_path / "ours").image_token_id == 700
    assert processor.too_long is TooLong.cut
    convert_back(str(tmp_path / "ours"), tmp_path / "back", report=silent)
    for file in TOKENIZER.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_template_that_the_tokenizer_cannot_write_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SMALL.write(tmp_path / "source")
    argv = ["convert", str(source), str(tmp_path / "ours"), "--tokenizer", str(TOKENIZER)]
    assert "no such template" in failing([*argv, "--template", "vicuna"], capsys)
    assert "is written with <|system|>" in failing([*argv, "--template", "phi3_instruct"], capsys)
    assert main(argv) == 0


def test_generation_settings_of_training_stay_behind(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source", max_length=20, do_sample=True, temperature=0.9)
    write(
        source / "generation_config.json", {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.9, "top_p": 0.6}
    )
    lines: list[str] = []
    convert(str(source), tmp_path / "ours", report=lines.append)
    left = "settings of generate left behind: do_sample, max_length, temperature, top_p."
    assert any(line.startswith(left) for line in lines)
    settings = json_of(tmp_path / "ours" / "generation_config.json")
    assert {key: value for key, value in settings.items() if key != "transformers_version"} == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
        "use_cache": True,
    }
    text = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours").config.text_config.to_dict()
    assert not {"max_length", "do_sample", "temperature"} & text.keys()


def assemble(case: str, folder: Path) -> Path:
    """A golden case as a checkpoint folder."""
    meta = json_of(GOLDEN / "cases" / case / "meta.json")
    folder.mkdir()
    shutil.copy(GOLDEN / "cases" / case / "config.json", folder)
    shutil.copy(GOLDEN / meta["checkpoint"] / "model.safetensors", folder)
    shutil.copytree(GOLDEN / "vision_tower", folder / "vision_tower")
    return folder


@pytest.mark.parametrize("case", ["l_default", "l_2xsample", "l_start2_interval2", "l_hd_anyres", "l_phi3_default"])
def test_a_converted_checkpoint_answers_as_published(
    case: str,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    convert(str(assemble(case, tmp_path / "source")), tmp_path / "ours", report=silent)
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    vision, folder = model.config.typed_vision(), GOLDEN / "cases" / case
    meta = json_of(folder / "meta.json")
    with safe_open(folder / "inputs.safetensors", "pt") as inputs:
        rows, mask = inputs.get_tensor("input_ids"), inputs.get_tensor("attention_mask").bool()
    for row, answer in enumerate(meta["greedy"]):
        ids = rows[row][mask[row]].tolist()
        image = meta["images"][row]
        sample = make_sample(
            case,
            ids,
            ids,
            [Image.open(folder / image)] if image else [],
            plan=model.plan,
            vision=vision,
            image_token_id=model.config.image_token_id,
            max_length=model.config.sample_max_length,
        )
        batch = collate([sample], pad_id=0, side=PadSide.left, tokens_per_view=vision.patches_per_side**2)
        new = model.generate(**generation_inputs(batch), max_new_tokens=len(answer), do_sample=False, eos_token_id=None)
        assert new[0, batch.input_ids.shape[1] :].tolist() == answer
    assert [str(warning.message) for warning in recwarn if "deepstack" in warning.filename] == []
    assert [record.message for record in caplog.records] == []  # transformers' own


def test_a_run_starts_from_a_converted_folder_in_shards(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    convert(str(source), tmp_path / "ours", report=silent)
    config = DeepStackConfig.from_pretrained(tmp_path / "ours")
    files = TensorFiles(tmp_path / "ours")
    sizes = {name: tensor.nbytes for name, tensor in files.items()}
    shards = tmp_path / "shards"
    shards.mkdir()
    written = write_tensors(shards, sizes, files.__getitem__, limit=sum(sizes.values()) // 3)
    assert len(written) > 2
    shutil.copy(tmp_path / "ours" / "config.json", shards)
    architecture = {
        key: value for key, value in config.text_config.to_dict().items() if key not in ("model_type", "dtype")
    }
    model = build_model(
        ModelConfig(name="baseline", tiles=0, groups=0),
        LLMConfig(name="tiny", family="llama", architecture=architecture),
        config.typed_vision(),
        ProjectorConfig(name="mlp"),
        seed=3,
        image_token_id=-200,
    )
    load_weights(model, shards)
    published = tensors_of(source)
    state = rename_to_published(model.state_dict(), model.config)
    assert all(torch.equal(state[name], published[name].float()) for name in published)
    loaded = DeepStackForConditionalGeneration.from_pretrained(shards)
    assert torch.equal(loaded.state_dict()["language_model.lm_head.weight"], published["lm_head.weight"])


def test_a_model_trained_here_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    source = Replica(layers=8, tower_layers=6, appended=True).write(tmp_path / "source", torch_dtype=None)
    convert(str(source), tmp_path / "ours", tokenizer=str(TOKENIZER), report=silent)
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.config.published = None  # a run of this project knows of no published config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "run")
    DeepStackProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "run")
    lines: list[str] = []
    convert_back(str(tmp_path / "run"), tmp_path / "out", report=lines.append)
    assert any("without <image>" in line for line in lines)
    assert "<image>" not in (tmp_path / "out" / "tokenizer.json").read_text()
    written = json_of(tmp_path / "out" / "config.json")
    assert written["unfreeze_mm_vision_tower"] is True  # or the published loader would take CLIP's weights
    assert tensors_of(tmp_path / "out").keys() == tensors_of(source).keys()
    convert(str(tmp_path / "out"), tmp_path / "again", report=silent)
    again = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.plan.digest == model.plan.digest
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_plan_without_published_words_stays_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(str(SMALL.write(tmp_path / "source")), tmp_path / "ours", report=silent)
    config = json_of(tmp_path / "ours" / "config.json")
    config["plan"]["injections"][0]["operator"] = "gated_add"
    write(tmp_path / "ours" / "config.json", config)
    text = failing(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published"], capsys)
    assert "has no published words" in text
    assert "published injections have no gates" in text
    assert not (tmp_path / "back").exists()


def test_names_go_both_ways_also_in_parts(tmp_path: Path) -> None:
    convert(str(SMALL.write(tmp_path / "source")), tmp_path / "ours", report=silent)
    config, published = DeepStackConfig.from_pretrained(tmp_path / "ours"), tensors_of(tmp_path / "source")
    part = {name: tensor for name, tensor in published.items() if "layers.2." in name}
    ours = rename_to_ours(part, config)
    assert "vision_tower.tower.visual.transformer.resblocks.2.attn.in_proj_bias" in ours
    again = rename_to_published(ours, config)
    assert again.keys() == part.keys()
    assert all(torch.equal(again[name], part[name]) for name in part)
    with pytest.raises(ValueError, match="q_proj, k_proj and v_proj come together"):
        rename_to_ours({name: tensor for name, tensor in part.items() if "q_proj" not in name}, config)
    with pytest.raises(ValueError, match=r"model\.vision_tower\.stray: nothing in this project answers"):
        rename_to_ours({"model.vision_tower.stray": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"gates\.llm: published checkpoints have no such tensor"):
        rename_to_published({"gates.llm": torch.zeros(4)}, config)


def test_the_command_line_answers_without_torch() -> None:
    code = """
import sys
from deepstack_pl.cli.main import main
try:
    main(["convert", "--help"])
finally:
    assert not {"torch", "transformers", "lightning", "hydra"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--to {deepstack_pl,published}" in done.stdout


def test_a_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    source = SMALL.write(tmp_path / "source")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr("deepstack_pl.multimodal.tensor_files.save_file", interrupt)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 130
    assert left_behind(tmp_path, before) == set()
    assert "stopped by Ctrl-C" in capsys.readouterr().err


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SMALL.write(tmp_path / "source")
    full = shutil.disk_usage(tmp_path)._replace(free=7)
    monkeypatch.setattr("deepstack_pl.multimodal.tensor_files.disk_usage", lambda folder: full)
    assert "where 7 are free. Make room" in failing(["convert", str(source), str(tmp_path / "ours")], capsys)


def test_a_model_that_was_loaded_and_saved_again_still_goes_back_as_it_came(tmp_path: Path) -> None:
    source = SMALL.write(tmp_path / "source")
    convert(str(source), tmp_path / "ours", report=silent)
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    convert_back(str(tmp_path / "again"), tmp_path / "back", report=silent)
    assert json_of(tmp_path / "back" / "config.json") == json_of(source / "config.json")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(same_bytes(after[key], before[key]) for key in before)
