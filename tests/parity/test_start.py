"""A run starts from a converted checkpoint: its configuration, tokenizer and weights, without a network."""

from pathlib import Path

import pytest
import replica
import torch
from replica import Replica
from tiny_run import go_on, run_of, start

from deepstack_pl.cli.assemble import make_processor, model_builder
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.convert import convert
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

TOKENIZER = Path(__file__).parents[1] / "golden" / "text" / "tokenizer"
HOSTS = (
    "llm=vicuna_7b",
    *(
        f"llm.architecture.{name}={value}"
        for name, value in {
            "num_hidden_layers": 8,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 704,
            "rope_theta": 300.0,
        }.items()
    ),
    "vision=clip_l_336",
    *(
        f"vision.{name}={value}"
        for name, value in {
            "image_size": 16,
            "patch_size": 4,
            "width": 12,
            "layers": 6,
            "heads": 2,
            "mlp_ratio": 20 / 12,
        }.items()
    ),
    "data.fine_print.view_size=16",
    "evaluation.max_new_tokens=64",
)


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(replica, "VOCABULARY", 704)
    source = Replica(layers=8, tower_layers=6).write(tmp_path / "source")
    convert(str(source), tmp_path / "converted", tokenizer=str(TOKENIZER), report=lambda line: None)
    monkeypatch.chdir(tmp_path)
    return Path("converted")


def test_a_run_starts_from_a_converted_checkpoint_and_fetches_nothing(converted: Path) -> None:
    run = run_of(f"init_from={converted}", *HOSTS)
    processor = make_processor(run)
    assert processor.tokenizer.get_vocab() == load_tokenizer(str(converted)).get_vocab()
    model = model_builder(run, processor.image_token_id)()
    assert model.config.text_config.pad_token_id == 0, "the checkpoint's own configuration, in full"
    theirs = DeepStackForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_it_trains_as_deepstack_l_and_as_hd(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = start(f"init_from={converted}", *HOSTS, folder=Path("l"))
    assert (plain["status"], plain["init_from"]) == ("finished", "converted")
    hd = start(f"init_from={converted}", "model=deepstack_l_hd", *HOSTS, folder=Path("hd"))
    assert hd["receipt"]["ok"]
    assert "init_from=converted has no image_newline: drawn anew" in capsys.readouterr().out


def test_another_architecture_than_the_folders_is_refused(converted: Path) -> None:
    run = run_of(f"init_from={converted}", *HOSTS, "llm.architecture.rope_theta=10000.0")
    with pytest.raises(ValueError, match=r"conf and the checkpoint converted disagree .*rope_theta"):
        make_processor(run)


@pytest.mark.slow
def test_going_on_needs_the_runs_own_folder_alone(converted: Path) -> None:
    start(f"init_from={converted}", *HOSTS, "callbacks.checkpoint.every_steps=1", folder=Path("run"))
    converted.rename("elsewhere")
    more = go_on("ckpt_path=run", "trainer.max_steps=4")
    assert (more["status"], more["steps"]) == ("finished", 4)


def test_a_published_folder_is_refused_with_the_command_that_converts_it(converted: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is of a deepstack_llama.*`deepstack convert source FOLDER`"):
        start("init_from=source", *HOSTS, folder=Path("run"))
