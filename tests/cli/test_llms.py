"""``llm=`` as typed: every option without a network, tiny twins, tokenizers, attention."""

import json
from pathlib import Path

import pytest
import torch
from llms import NAMES
from tiny_run import SMALL, results_of, run_of

from deepstack_pl.cli import checks
from deepstack_pl.cli.assemble import make_processor, settle, tokenizer_of
from deepstack_pl.cli.run import execute
from deepstack_pl.language.conversation import load_tokenizer

FLASH = ("llm.attention=flash_attention_2",)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_dries_without_a_network(name: str) -> None:
    run = run_of(f"llm={name}", "dry_run=true")
    checks.check(run)
    assert settle(run) == []
    assert run.llm.layers == run.llm.architecture["num_hidden_layers"]


def test_a_twin_says_what_is_built_and_with_which_tokenizer() -> None:
    run = run_of("llm=gemma3_1b", "llm.size=tiny", "llm.init=random")
    checks.check(run)
    built, written = settle(run)
    assert built.startswith("llm.size=tiny: of gemma3_1b its twin is built, with num_hidden_layers 12, hidden_size 96")
    assert "text is written with the shipped tokenizer and template, not with gemma3" in written


def test_a_plan_is_checked_against_the_twin() -> None:
    with pytest.raises(ValueError, match="reach layer 13, but the LLM has 12 layers"):
        run_of("llm=phi3", "llm.size=tiny", "llm.init=random", "model.start_layer=10")
    run = run_of("llm=phi3", "llm.size=tiny", "llm.init=random", "llm.architecture.num_hidden_layers=8")
    assert run.llm.layers == 8


def test_a_twin_of_published_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"llm=phi3 llm\.size=tiny: nobody trained the tiny twin.*llm\.init=random"):
        run_of("llm=phi3", "llm.size=tiny")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tokenizer = load_tokenizer(None)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_random_weights_take_the_tokenizer_of_a_local_folder_and_its_template(folder: str) -> None:
    run = run_of("llm=smollm2_135m", "llm.init=random", f"llm.checkpoint={folder}")
    assert settle(run) == []
    processor = make_processor(run)
    assert processor.template.name == "smollm2"
    assert "<|im_end|>" in processor.tokenizer.get_vocab()


@pytest.mark.parametrize("overrides", [[], ["llm.size=tiny"]])
def test_the_shipped_tokenizer_stands_in_for_one_on_the_hub_and_for_every_twins(
    overrides: list[str], folder: str
) -> None:
    run = run_of("llm=smollm2_135m", "llm.init=random", *overrides)
    if overrides:
        run.llm.checkpoint = folder
    assert tokenizer_of(run.llm) is None
    assert "not with smollm2, whose tokens come with the weights of" in settle(run)[-1]
    assert run.llm.template == "shipped"
    assert len(make_processor(run).tokenizer) == 512


def test_flash_attention_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[flash\]' -c constraints\.txt"):
        checks.check(run_of(*FLASH))


def test_flash_attention_without_a_gpu_or_half_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        checks.check(run_of(*FLASH))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for precision in ("32-true", "bf16-mixed"):  # the receipt reads weights in float32 there
        with pytest.raises(ValueError, match=rf"trainer\.precision={precision}"):
            checks.check(run_of(*FLASH, "trainer=gpu", f"trainer.precision={precision}"))
    checks.check_attention(run_of(*FLASH, "trainer=gpu", "trainer.precision=bf16-true"))


def test_what_stands_in_for_torchs_varlen_kernel_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("llm.attention=varlen", "compile=true")
    with pytest.raises(ValueError, match=r"on the CPU, with trainer\.precision=32-true cannot be compiled"):
        checks.check(run_of(*words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"on a GPU with trainer\.precision=32-true cannot be compiled"):
        checks.check(run_of(*words, "trainer=gpu", "trainer.precision=32-true"))
    checks.check_attention(run_of(*words, "trainer=gpu", "trainer.precision=bf16-mixed"))


@pytest.mark.slow
def test_a_twin_trains_and_its_folder_holds_what_was_built(tmp_path: Path) -> None:
    run = run_of(*SMALL, "~logger", "model=deepstack_l", "llm=phi3", "llm.size=tiny", "llm.init=random")
    execute(run, tmp_path / "run", "python train.py")
    text = json.loads((tmp_path / "run" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["num_hidden_layers"], text["vocab_size"]) == ("phi3", 12, 512)
    assert results_of(tmp_path / "run")["steps"] == 3
    assert len(load_tokenizer(str(tmp_path / "run"))) == 512
