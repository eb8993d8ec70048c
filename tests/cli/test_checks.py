"""What is refused before a run costs anything."""

import re
from pathlib import Path

import pytest
from tiny_run import run_of

from deepstack_pl.cli import checks
from deepstack_pl.cli.assemble import build_trainer, make_processor, settle
from deepstack_pl.cli.run import execute


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=True: it would end before max_steps"),
        ("+trainer.limit_train_batches=2", "trainer.max_steps steps. Shorten a run there"),
        ("+trainer.overfit_batches=1", "experiment=debug"),
        ("+trainer.max_epochs=2", "a run is trainer.max_steps steps long"),
        ("+trainer.max_time=00:01:00:00", "Ctrl-C ends it earlier"),
        ("+trainer.gradient_clip_val=0.5", "optim.clip_norm"),
        ("+trainer.accumulate_grad_batches=2", "and data.micro_batch_size (units a forward)"),
        ("trainer.num_nodes=2", "strategy=single is one process, but trainer.devices=None and trainer.num_nodes=2"),
        ("trainer.devices=2", "Say strategy=fsdp or strategy=ddp"),
        ("+trainer.strategy=fsdp", "strategy=single, ddp, fsdp or fsdp_hybrid"),
        ("+trainer.plugins=[]", "the strategy's affair"),
        ("+trainer.sync_bathnorm=true", "Unknown key trainer.sync_bathnorm"),
        ("llm.template=shiped", "plain, qwen3, shipped, smollm2, vicuna_v1. Did you mean shipped?"),
        ("init_from=nowhere", "init_from=nowhere: there is no model.safetensors"),
        ("llm.architecture.hidden_size=97", "llm.architecture: The hidden size (97) is not a multiple"),
        ("llm.architecture.hidden_size=wide", "llm.architecture: Field 'hidden_size' expected int"),
        ("+llm.architecture.num_heads=3", "Unknown key llm.architecture.num_heads"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        execute(run_of(override, "dry_run=true"), tmp_path / "run", "python train.py")


def test_heads_that_do_not_divide_the_width_are_refused_where_the_family_does_not_look() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads=32 does not divide llm\.architecture.hidden_size=3073"):
        checks.check(run_of("llm=phi3", "llm.architecture.hidden_size=3073"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("words", [["data.batching=packed"], ["llm.attention=varlen"]], ids=lambda words: words[0])
def test_positions_that_follow_from_a_rows_longest_sample_are_refused_in_shared_rows(
    kind: str, words: list[str]
) -> None:
    """transformers chooses the factors of a whole row by its largest position."""
    factors = "short_factor:[1,1,1,1,1,1],long_factor:[2,2,2,2,2,2]" if kind == "longrope" else "factor:2.0"
    rope = f"rope_type:{kind},rope_theta:10000.0,{factors},original_max_position_embeddings:64"
    scaled = [f"+llm.architecture.rope_parameters={{{rope}}}", "llm.architecture.max_position_embeddings=4096"]
    with pytest.raises(ValueError, match=f"rope_type={kind}.*Set llm.max_length=64 or less, or say data.batching=sam"):
        checks.check(run_of(*scaled, *words, "llm.max_length=512"))
    checks.check(run_of(*scaled, *words, "llm.max_length=64"))
    checks.check(run_of(*scaled, "llm.max_length=512"))


def test_attention_dropout_that_the_kernel_does_not_know_is_refused_before_the_first_step() -> None:
    dropout = "+llm.architecture.attention_dropout=0.1"
    checks.check(run_of(dropout))
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1 with llm.attention=varlen"):
        checks.check(run_of(dropout, "llm.attention=varlen"))


def test_one_device_may_be_chosen_by_its_number() -> None:
    checks.check(run_of("trainer.devices=[1]"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy=fsdp"], "strategy=fsdp takes a process for each device, and there is no GPU here to count"),
        (["strategy=fsdp", "trainer.devices=3"], "data.batch_size=64 is not a whole number of micro-batches"),
        (["strategy=fsdp", "trainer.devices=2", "trainer.precision=16-mixed"], "bfloat16 needs no loss scaler"),
        (["strategy=fsdp_hybrid", "trainer.devices=4", "strategy.replicas=3"], "replicas=3 does not divide 4"),
        (["strategy=fsdp", "trainer.devices=2", "strategy.replicas=2"], "are the groups of strategy=fsdp_hybrid"),
        (["strategy=fsdp", "trainer.devices=1"], "trainer.devices=1 is one here. Say strategy=single"),
        (["strategy=fsdp", "trainer.devices=0"], "trainer.devices=0: use 1 or more"),
        (["strategy=fsdp", "trainer.devices=two"], "trainer.devices=two: use 1 or more"),
        (["strategy=fsdp", "trainer.devices=[2,3]"], "CUDA_VISIBLE_DEVICES=2,3, and say trainer.devices=2"),
        (["trainer.num_nodes=two"], "trainer.num_nodes=two: machines, 1 or more"),
        (["trainer.num_nodes=0"], "trainer.num_nodes=0: machines, 1 or more"),
        (["strategy.timeout=0"], "strategy.timeout=0.0: seconds, more than 0"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        checks.check(run_of(*words))


def test_init_from_is_refused_before_data_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="init_from=nowhere"):
        execute(run_of("init_from=nowhere"), tmp_path / "run", "python train.py")
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    run = run_of("llm.architecture.vocab_size=500")
    with pytest.raises(ValueError, match="vocab_size=500, but the tokenizer's largest id is 511"):
        checks.check_vocabulary(run, make_processor(run))
    fits = run_of()
    checks.check_vocabulary(fits, make_processor(fits))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [([], []), (["stage=pretrain"], ["vision", "llm"]), (["stage=finetune", "init_from=x"], [])],
)
def test_a_frozen_part_of_random_weights_is_said(overrides: list[str], parts: list[str]) -> None:
    notes = settle(run_of(*overrides))
    assert [note.split(":")[0] for note in notes] == parts


@pytest.mark.parametrize(("off", "there"), [("null", False), ("{every_steps: 5}", True)])
def test_callbacks_that_are_null_are_off(off: str, there: bool, tmp_path: Path) -> None:
    run = run_of(f"callbacks.checkpoint={off}", f"callbacks.progress={off}")
    trainer = build_trainer(run, tmp_path, [], None)
    assert bool(trainer.checkpoint_callback) is there
    assert bool(trainer.progress_bar_callback) is there
