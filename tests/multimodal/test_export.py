"""`deepstack export`: what it writes, what it proves, and what it refuses without leaving anything behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llms import twin
from safetensors.torch import load_file, save_file
from small_run import STACKED, TOKENIZER, Pages, small_model, small_processor
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from deepstack_pl.batch import PadSide
from deepstack_pl.cli.main import main
from deepstack_pl.multimodal import export as exporting
from deepstack_pl.multimodal import proof
from deepstack_pl.multimodal.card import Origin
from deepstack_pl.multimodal.config import LoRAConfig
from deepstack_pl.multimodal.export import export
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor, generation_inputs
from deepstack_pl.stacking.config import Host, ModelConfig, Operator

LORA = {"llm": LoRAConfig(rank=4, alpha=8.0)}
ORIGIN = Origin(
    run="my run", weights={"llm": ("maker/llm", "MIT")}, data="pages", receipt="0123abcd", versions={"torch": "2"}
)


def a_run(folder: Path, plan: ModelConfig = STACKED, lora=None) -> Path:
    """What a finished run leaves, but for its records."""
    model = small_model(plan, lora=lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    small_processor(plan).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """As plain transformers gives them."""
    processor = DeepStackProcessor.from_pretrained(folder)
    batch = processor.collate([processor.prompt(Pages()[1])], PadSide.left)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model(**generation_inputs(batch)).logits.float()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def said(proofs) -> dict[str, str]:
    return {found.claim: found.found for found in proofs}


def write(source: Path, folder: Path, *, merge: bool = False, dtype: torch.dtype | None = None):
    return said(export(source, folder, merge=merge, dtype=dtype, origin=ORIGIN, report=lambda line: None))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, what it held, the folder it was exported to, and what was proven."""
    here = tmp_path_factory.mktemp("plain")
    source, folder = a_run(here / "run"), here / "exported"
    return source, contents(source), folder, write(source, folder)


def test_an_exported_run_is_the_run_and_says_what_was_proven(exported):
    source, before, folder, found = exported
    assert found["logits = the run's"] == "bit by bit"
    assert float(found["without injections into the llm"].removeprefix("logits change by ")) > 0
    assert found["generation with a cache = without"] == found["a prompt without an image"] == "8 tokens"
    assert torch.equal(logits(folder), logits(source))
    assert AutoConfig.from_pretrained(folder).plan == json.loads(before["config.json"])["plan"]
    assert contents(source) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["exported", "run"]


def test_the_folder_says_what_it_is_made_of_and_where_answers_end(exported):
    text = (exported[2] / "README.md").read_text()
    for words in ("# my run", "| llm | maker/llm | MIT |", "llm layer  1 | <- group 0", "0123abcd", "bit by bit"):
        assert words in text
    settings = json.loads((exported[2] / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [TOKENIZER.eos_token_id]
    assert settings["pad_token_id"] == TOKENIZER.pad_token_id


def test_the_snippet_of_the_readme_runs(exported, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(exported[2], folder)
    Pages()[0].images[0].save(folder / "page.png")
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run with adapters, and the folder where they are merged."""
    here = tmp_path_factory.mktemp("adapted")
    source, folder = a_run(here / "run", lora=LORA), here / "merged"
    return source, folder, write(source, folder, merge=True)


def test_merged_adapters_leave_a_model_without_any(adapted):
    source, folder, found = adapted
    assert 0 < float(found["logits = the run's"].split()[1]) <= 1e-5
    assert AutoConfig.from_pretrained(folder).lora == {}
    assert load_file(folder / "model.safetensors").keys() == small_model().state_dict().keys()
    assert (logits(folder) - logits(source)).abs().max() <= 1e-5 * logits(source).abs().max()


def test_adapters_that_are_not_merged_go_along(adapted, tmp_path):
    source, folder = adapted[0], tmp_path / "exported"
    assert write(source, folder)["logits = the run's"] == "bit by bit"
    assert "Adapters (LoRA) stand beside the weights of: llm" in (folder / "README.md").read_text()
    assert contents(folder)["model.safetensors"] == contents(source)["model.safetensors"]


def test_weights_are_cast_where_asked_and_merged_in_float32_before(adapted, tmp_path):
    source, merged, _ = adapted
    found = write(source, tmp_path / "exported", merge=True, dtype=torch.bfloat16)["logits = the run's"]
    assert 1e-4 < float(found.split()[1]) < 5e-2
    stored, exact = load_file(tmp_path / "exported" / "model.safetensors"), load_file(merged / "model.safetensors")
    assert stored.keys() == exact.keys()
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in stored.items())


def test_a_plan_without_injections_says_that_there_are_none(tmp_path):
    plan = ModelConfig(name="baseline", tiles=0, groups=0)
    assert write(a_run(tmp_path / "run", plan), tmp_path / "exported")["without injections"] == "plan baseline has none"


def test_both_hosts_are_tried(tmp_path):
    plan = ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0)
    assert "without injections into the vit" in write(a_run(tmp_path / "run", plan), tmp_path / "exported")


def refused(tmp_path: Path, says: str, plan: ModelConfig = STACKED) -> None:
    """The export fails, nothing of it is left, and the run is as it was."""
    source = a_run(tmp_path / "run", plan)
    before = contents(source)
    with pytest.raises(ValueError, match=says):
        write(source, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert contents(source) == before


def test_one_weight_that_changed_on_the_way_is_found(tmp_path, monkeypatch):
    save = DeepStackForConditionalGeneration.save_pretrained

    def tamper(model, folder, **more):
        save(model, folder, **more)
        if Path(folder).name != "run":
            state = load_file(Path(folder) / "model.safetensors")
            first = next(name for name in sorted(state) if name.startswith("projector."))
            state[first].view(-1)[3] += 0.5
            save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(DeepStackForConditionalGeneration, "save_pretrained", tamper)
    refused(tmp_path, r"is not the run's model: 1 tensors on disk are not those that were written")


def test_a_model_too_far_from_the_run_is_found(tmp_path, monkeypatch):
    merge = exporting.merge_adapters

    def spoil(model):
        merge(model)
        with torch.no_grad():
            model.language_model.lm_head.weight.mul_(1.001)

    monkeypatch.setattr(exporting, "merge_adapters", spoil)
    source = a_run(tmp_path / "run", lora=LORA)
    with pytest.raises(ValueError, match=r"merged = unmerged, in float32 does not hold.* and 1e-04 is allowed"):
        write(source, tmp_path / "exported", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_cache_that_forgets_is_found(tmp_path, monkeypatch):
    generate = proof._generate

    def forget(model, inputs, *, use_cache):
        ids = generate(model, inputs, use_cache=use_cache)
        return ids if use_cache else [*ids[:-1], ids[-1] + 1]

    monkeypatch.setattr(proof, "_generate", forget)
    refused(tmp_path, "greedy generation with a cache gives")


def test_injections_that_change_nothing_are_found(tmp_path):
    plan = ModelConfig(name="gated", operator=Operator.gated_add, start_layer=1)
    says = r"plan gated injects into the llm changes no logit, for its gates are closed: train it until they open\. "
    refused(tmp_path, says, plan)


def test_a_folder_inside_the_run_is_refused(tmp_path):
    source = a_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"lies in .*run, which is only read"):
        write(source, source / "exported")


def test_a_run_in_bfloat16_is_written_in_float32_though_its_family_rounds_a_buffer(tmp_path):
    """Gemma scales embeddings by a buffer that loading rounds with the weights, and makes anew in float32."""
    small_model(STACKED, replace(twin("gemma3_1b"), template="shipped")).bfloat16().save_pretrained(tmp_path / "run")
    small_processor().save_pretrained(tmp_path / "run")
    assert write(tmp_path / "run", tmp_path / "exported", dtype=torch.float32)["logits = the run's"] == "bit by bit"


def test_a_folder_that_is_there_already_is_left_alone(tmp_path):
    source, folder = a_run(tmp_path / "run"), tmp_path / "exported"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(ValueError, match="is there already, and not empty"):
        write(source, folder)
    assert contents(folder) == {"precious": b"x"}


def test_nothing_to_merge_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no adapters: there is nothing to merge"):
        write(a_run(tmp_path / "run"), tmp_path / "exported", merge=True)


def command(capsys, *words: object) -> tuple[int, str]:
    status = main(["export", *map(str, words)])
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "there is no such folder"),
        ({}, "holds no config.json"),
        ({"config.json": {"model_type": "llama"}}, "is a 'llama', not a model of this project"),
        ({"config.json": {"model_type": "deepstack_pl"}}, "no safetensors"),
        ({"config.yaml": {}}, "never began to train. Go on with it: python train.py ckpt_path="),
        (
            {"results.json": {"status": "failed", "steps": 2, "max_steps": 3}},
            "is not finished, but failed, at step 2 of 3",
        ),
        ({"results.json": {"status": "interrupted"}}, "is not finished, but interrupted"),
        ({"results.json": {"status": "running"}}, "is not finished, but running"),
    ],
)
def test_what_is_no_finished_run_is_refused_in_a_sentence(tmp_path, capsys, files, says):
    source = tmp_path / "run"
    if files is not None:
        source.mkdir()
    for name, values in (files or {}).items():
        (source / name).write_text(json.dumps(values))
    status, text = command(capsys, source, tmp_path / "exported")
    assert status == 1
    assert says in text
    assert not (tmp_path / "exported").exists()


def test_the_command_prints_what_was_proven(tmp_path, capsys):
    source = a_run(tmp_path / "run")
    (source / "results.json").write_text('{"status": "finished"}')
    status, text = command(capsys, source, tmp_path / "exported")
    assert status == 0
    for words in ("logits = the run's", "bit by bit", "logits change by", "written to", "tensors, float32"):
        assert words in text
    assert not (tmp_path / "exported" / "results.json").exists()
