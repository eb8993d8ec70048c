"""Whole models on every tower: what is injected arrives, nothing trained is idle, folders hold all."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_run
import torch
from tiny_towers import ALL, CONFIGS

from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.multimodal.published.configuration import write_config
from deepstack_pl.stacking.config import Encoding, GridRule, Host, InjectionConfig, ModelConfig

BOTH = ModelConfig(
    name="deepstack_lv",
    start_layer=1,
    injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)],
)
ONE_PASS = ModelConfig(name="one_pass", start_layer=1, encoding=Encoding.one_pass, grid=GridRule.square)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_both_hosts_receive_what_the_plan_says(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small_run, "VISION", replace(CONFIGS[name], layers=4, feature_layer=-1))
    model, processor = small_run.small_model(BOTH), small_run.small_processor(BOTH)
    receipt = take_receipt(model, processor)
    assert len(receipt.rows) == 8
    assert [row.reason for row in receipt.rows if not row.ok] == []
    model.save_pretrained(tmp_path)
    for key, value in type(model).from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("qwen3_vl", "siglip", "timm_siglip")])
def test_one_pass_is_what_the_receipt_makes_of_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_run, "VISION", CONFIGS[name])
    receipt = take_receipt(small_run.small_model(ONE_PASS), small_run.small_processor(ONE_PASS))
    assert [row.reason for row in receipt.rows if not row.ok] == []


@pytest.mark.parametrize("name", ["clip", "timm_siglip", "qwen3_vl"])
def test_towers_that_the_published_code_has_not_are_not_written_for_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_run, "VISION", CONFIGS[name])
    config = small_run.small_model(ModelConfig(name="baseline", tiles=0, groups=0), device="meta").config
    with pytest.raises(ValueError, match=r"vision=tiny: towers there are CLIP's"):
        write_config(config)
