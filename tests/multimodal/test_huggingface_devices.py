"""Dtypes, device maps, compilation, and what transformers asks a model to return."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXED, PLANS, batch_of, prompts, tiny_model
from transformers import AutoModelForImageTextToText

from deepstack_pl.batch import PadSide
from deepstack_pl.language.host import assert_installed


@pytest.mark.parametrize("spread", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_a_device_map_changes_nothing(spread: Any, tmp_path: Path) -> None:
    model = tiny_model(PLANS["deepstack_lv"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=spread)
    assert_installed(loaded.language_model)
    batch = batch_of(model, MIXED[:2], PadSide.left)
    assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "prefill_chunk_size": 5}
    assert torch.equal(loaded.generate(**prompts(batch), **how), model.generate(**prompts(batch), **how))


def test_what_must_stay_on_one_device_is_named_by_its_own_classes() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    assert model._no_split_modules == {"VisionEncoder", "LlamaDecoderLayer"}
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}


def test_loaded_in_bfloat16_it_answers(tmp_path: Path) -> None:
    model = tiny_model(PLANS["deepstack_l"])
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = batch_of(model, side=PadSide.left)
    full, rounded = (m(**batch.model_inputs()).logits.float()[batch.attention_mask] for m in (model, half))
    assert (full - rounded).abs().max() < 0.1 * full.abs().max()
    assert half.generate(**prompts(batch), max_new_tokens=2, eos_token_id=None).shape[1] == batch.input_ids.shape[1] + 2


@pytest.mark.slow
def test_the_forward_compiles_without_a_break_and_no_more_than_twice_and_offloading_changes_nothing() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parents[1] / "src")}
    done = subprocess.run([sys.executable, str(here / "untyped.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_outputs_are_the_language_models_own() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    batch = batch_of(model)
    inputs = batch.model_inputs()
    whole = model(**inputs, output_hidden_states=True)
    assert len(whole.hidden_states) == 7
    del inputs["labels"]
    last = model(**inputs, logits_to_keep=2)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:], atol=1e-6, rtol=1e-5)
    assert last.loss is None
    assert whole.loss.requires_grad
    model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 6


def test_hidden_states_are_the_stream_before_each_layers_injection() -> None:
    model = tiny_model(PLANS["deepstack_l"])
    inputs = batch_of(model, MIXED[1:2]).model_inputs()
    output = model(**inputs, output_hidden_states=True, record=True)
    first = output.record[0]
    assert first.injection.layer == 1
    entered: list[torch.Tensor] = []
    layer = model.language_model.get_decoder().layers[1]
    handle = layer.self_attn.register_forward_pre_hook(
        lambda m, a, k: entered.append(k["hidden_states"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    expected = layer.input_layernorm(output.hidden_states[1] + first.added)
    torch.testing.assert_close(entered[0], expected)
