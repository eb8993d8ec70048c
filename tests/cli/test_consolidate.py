"""`deepstack consolidate`: a checkpoint's shares as one folder, that of a run that wrote it itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_model, small_processor

from deepstack_pl.cli.main import main
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.training.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def a_run(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> DeepStackForConditionalGeneration:
    """What an interrupted run leaves: configuration, processor, checkpoints of steps 5 and 7 (whose model it is)."""
    model = small_model(tied=tied)
    model.config.save_pretrained(folder)
    small_processor().save_pretrained(folder)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' own annotation is of another method
    for step in (5, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in model.named_parameters()}
        tensors = {"model": dict(model.state_dict()), "optimizer": moments}
        Store(folder / "checkpoints").write(step, tensors, {}, {}, {})
    return model


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_it_is_what_the_model_itself_would_have_written(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    run, own = tmp_path / "run", tmp_path / "own"
    model = a_run(run, tied=tied, dtype=dtype)
    before = {file.name for file in run.iterdir()}
    assert main(["consolidate", str(run)]) == 0
    folder = run / "weights" / "step-00000007"
    model.save_pretrained(own)
    DeepStackProcessor.from_pretrained(run).save_pretrained(own)
    assert {file.name for file in folder.iterdir()} == {file.name for file in own.iterdir()}
    for file in own.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in run.iterdir()} == before | {"weights"}


def test_any_step_goes_anywhere_and_loads_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run")
    assert main(["consolidate", str(tmp_path / "run"), str(tmp_path / "there"), "--step", "5"]) == 0
    assert "tensors of step 5" in capsys.readouterr().out
    weights = load_file(tmp_path / "there" / "model.safetensors")
    assert all(tensor.eq(5).all() for name, tensor in weights.items() if tensor.is_floating_point())
    model = DeepStackForConditionalGeneration.from_pretrained(tmp_path / "there")
    assert model.dtype is torch.float32


def test_a_damaged_one_is_passed_over_unless_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    a_run(run)
    file = run / "checkpoints" / "step-00000007" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    assert main(["consolidate", str(run), "--step", "7"]) == 1
    assert "step-00000007 is damaged: __0_0.distcp is not what was written" in capsys.readouterr().err
    assert main(["consolidate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "step-00000007 is damaged and passed over" in said
    assert "tensors of step 5" in said


def test_weights_that_should_be_one_and_are_two_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_run(tmp_path, tied=True)
    head = "language_model.lm_head.weight"
    tensors = {"model": {**model.state_dict(), head: model.state_dict()[head] + 1}}
    Store(tmp_path / "checkpoints").write(8, tensors, {}, {}, {})
    assert main(["consolidate", str(tmp_path)]) == 1
    assert f"{head} apart from" in capsys.readouterr().err
    assert not (tmp_path / "weights" / "step-00000008").exists()


def test_what_cannot_be_gathered_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    a_run(run)

    def refused(*words: str) -> str:
        assert main(["consolidate", *words]) == 1
        return capsys.readouterr().err

    assert "there is no such folder" in refused(str(tmp_path / "nowhere"))
    assert "no checkpoint of step 6. There are: 7, 5." in refused(str(run), "--step", "6")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint that is whole. It ended before its first" in refused(str(tmp_path / "empty"))
    (run / "full").mkdir()
    (run / "full" / "file").touch()
    assert "is there already" in refused(str(run), str(run / "full"))
    config = run / "config.json"
    values = json.loads(config.read_text())
    values["text_config"]["intermediate_size"] += 1
    config.write_text(json.dumps(values))
    said = refused(str(run), str(tmp_path / "other"))
    assert "is not of the model that" in said
    assert "18 tensors are missing, left over or of another shape, the first being language_model" in said
    assert not (tmp_path / "other").exists()
