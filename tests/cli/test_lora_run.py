"""Whole runs with adapters: trained, stopped, gone on with, exported merged, started from."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import go_on, start
from transformers import AutoModelForImageTextToText

from deepstack_pl.cli.main import main


@pytest.mark.slow
def test_a_run_with_adapters_resumes_as_if_it_had_not_stopped_and_is_exported_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = ("stage=lora_both", "stage.llm.lora.rank=4", "stage.vision.lora.rank=4", "optim.warmup_ratio=0.0")
    through = start(*lora, folder=tmp_path / "through")
    assert through["status"] == "finished"
    start(*lora, "+callbacks.stop={_target_: tiny_run.StopEarly}", folder=tmp_path / "resumed")
    resumed = go_on(f"ckpt_path={tmp_path / 'resumed'}", "callbacks.stop=null")
    assert resumed["steps"] == 3
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("through", "resumed"))
    assert all(torch.equal(value, two[name]) for name, value in one.items()), "dropout is drawn anew at each step"
    assert any(value.any() for name, value in one.items() if "lora_B" in name)
    assert main(["export", "through", "exported", "--merge-lora"]) == 0
    model = AutoModelForImageTextToText.from_pretrained("exported")
    assert model.config.lora == {}
    started = start("init_from=exported", *lora, folder=tmp_path / "next")
    assert started["status"] == "finished"
    with pytest.raises(ValueError, match="holds adapters"):
        start("init_from=through", "stage=finetune", folder=tmp_path / "refused")
