"""Going on with a run: what is refused, and what may change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import leave_checkpoint

from deepstack_pl.cli.folders import LATEST, checkpoint_of, claim, newest, remember
from deepstack_pl.cli.resume import asked_for, prepare, whole
from deepstack_pl.config.load import save
from deepstack_pl.config.overrides import parse
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.schema import Schema
from deepstack_pl.data.config import DataConfig, FinePrintConfig
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.language.config import LLMConfig
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.training.config import OptimConfig, Spread, StageConfig, StrategyConfig
from deepstack_pl.vision.config import VisionConfig

CONF = Path(__file__).parents[2] / "conf"


def a_run(folder: Path, *, status: str = "interrupted", steps: int = 40, checkpoint: int | None = 40) -> Path:
    """A run's folder as an interrupted run leaves it."""
    run = RunConfig(
        model=ModelConfig(name="x"),
        llm=LLMConfig(name="x", family="llama", architecture={"num_hidden_layers": 12}),
        vision=VisionConfig(name="x"),
        projector=ProjectorConfig(name="x"),
        data=DataConfig(name="x", fine_print=FinePrintConfig(view_size=336, cells=4)),
        stage=StageConfig(name="x"),
        optim=OptimConfig(name="x"),
        evaluation=EvaluationConfig(name="x"),
        trainer={"max_steps": 100, "accelerator": "cpu"},
        strategy=StrategyConfig(name="single"),
    )
    (folder / "checkpoints").mkdir(parents=True)
    save(run, folder / "config.yaml")
    (folder / "results.json").write_text(json.dumps({"status": status, "steps": steps}))
    if checkpoint:
        leave_checkpoint(folder, checkpoint)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def go_on(*words: str, flags: tuple[str, ...] = ()):
    overrides = parse(words)
    wanted = asked_for(overrides)
    assert wanted is not None
    return prepare(wanted, overrides, flags, Schema((CONF,)))


def test_last_is_the_run_that_latest_names() -> None:
    old, new = a_run(Path("outputs/old")), a_run(Path("outputs/new"))
    remember(old)
    assert LATEST.read_text() == "outputs/old\n"
    resumed = go_on("ckpt_path=last")
    assert resumed.folder == old
    assert resumed.checkpoint == old / "checkpoints" / "step-00000040"
    assert go_on(f"ckpt_path={new}").folder == new


def test_without_latest_the_newest_run_is_found_in_a_sweep_too() -> None:
    arm = a_run(Path("outputs/sweeps/s/model=x"))
    assert newest() == arm


def test_machines_and_the_last_step_may_change() -> None:
    remember(a_run(Path("outputs/a")))
    run = go_on("ckpt_path=last", "trainer.max_steps=200", "trainer.accelerator=gpu", "data.workers=3").run
    assert run.trainer == {"max_steps": 200, "accelerator": "gpu"}
    assert run.data.workers == 3


@pytest.mark.parametrize(
    "change", ["seed=1", "model.start_layer=2", "data.batch_size=2", "stage.llm.lr=0.1", "llm.init=pretrained"]
)
def test_what_the_run_is_may_not_change(change: str) -> None:
    remember(a_run(Path("outputs/a")))
    with pytest.raises(ValueError, match="would no longer be the run it was"):
        go_on("ckpt_path=last", change)


@pytest.mark.parametrize("change", ["trainer=gpu", "model=baseline", "~logger", "trainer.max_steps=1,2"])
def test_only_single_values_may_change(change: str) -> None:
    remember(a_run(Path("outputs/a")))
    with pytest.raises(ValueError, match=r"Write KEY\.NAME=VALUE"):
        go_on("ckpt_path=last", change)


def test_a_checkpoint_that_is_named_is_the_one_used() -> None:
    folder = a_run(Path("outputs/a"))
    named = folder / "checkpoints" / "step-00000020"
    with pytest.raises(ValueError, match=r"there is no such checkpoint. Those of this run: step-00000040"):
        go_on(f"ckpt_path={named}")
    later = leave_checkpoint(folder, 60)
    named = folder / "checkpoints" / "step-00000040"
    resumed = go_on(f"ckpt_path={named}")
    assert (resumed.checkpoint, resumed.named) == (named, True)
    assert go_on(f"ckpt_path={folder}").checkpoint == later


def test_a_damaged_checkpoint_is_passed_over_and_said_and_never_taken_for_the_named_one() -> None:
    folder = a_run(Path("outputs/a"))
    damaged = leave_checkpoint(folder, 60)
    (damaged / "run.pt").write_bytes(b"half a file")
    resumed = go_on(f"ckpt_path={folder}")
    assert resumed.checkpoint.name == "step-00000040"
    assert "step-00000060 is damaged and passed over: run.pt has 11 bytes" in resumed.notes[0]
    with pytest.raises(ValueError, match=r"step-00000060 is damaged: run\.pt .* Name another of this run"):
        go_on(f"ckpt_path={damaged}")


def test_a_flipped_byte_is_found_before_anything_is_read() -> None:
    folder = a_run(Path("outputs/a"))
    (tensors,) = leave_checkpoint(folder, 60).glob("*.distcp")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    resumed = go_on(f"ckpt_path={folder}")
    assert resumed.checkpoint.name == "step-00000060", "sizes alone are looked at first"
    found, passed = whole(resumed)
    assert found.step == 40
    assert "is not what was written" in passed[0]
    with pytest.raises(ValueError, match=r"holds no checkpoint that is whole.*is not what was written"):
        whole(replace(resumed, named=True))


def test_the_size_of_a_forward_may_change_and_that_of_a_step_may_not() -> None:
    remember(a_run(Path("outputs/a")))
    assert go_on("ckpt_path=last", "data.micro_batch_size=2").run.data.accumulation() == 32
    with pytest.raises(ValueError, match=r"data\.batch_size=32 with ckpt_path: outputs/a would no longer be the run"):
        go_on("ckpt_path=last", "data.batch_size=32")


def test_only_one_run_is_gone_on_with() -> None:
    with pytest.raises(ValueError, match="ckpt_path=a,b: a start goes on with one run"):
        go_on("ckpt_path=a,b")


def test_flags_do_not_go_with_it() -> None:
    remember(a_run(Path("outputs/a")))
    with pytest.raises(ValueError, match="with -m"):
        go_on("ckpt_path=last", flags=("-m",))


def test_nothing_there_is_an_error_and_no_fresh_start() -> None:
    with pytest.raises(ValueError, match="no run under outputs/"):
        go_on("ckpt_path=last")
    with pytest.raises(ValueError, match="there is no run"):
        go_on("ckpt_path=elsewhere")
    assert not Path("outputs").exists()


def test_a_finished_run_says_so() -> None:
    remember(a_run(Path("outputs/a"), status="finished", steps=100))
    with pytest.raises(ValueError, match="finished: 100 of 100 steps"):
        go_on("ckpt_path=last")
    assert go_on("ckpt_path=last", "trainer.max_steps=200").run.trainer["max_steps"] == 200


def test_a_run_that_ended_before_its_first_checkpoint_says_so() -> None:
    remember(a_run(Path("outputs/a"), checkpoint=None))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        go_on("ckpt_path=last")


def test_a_crash_before_the_first_regular_checkpoint_is_gone_on_with() -> None:
    folder = a_run(Path("outputs/a"), checkpoint=7)
    assert checkpoint_of(folder)[0].step == 7


def test_a_run_is_not_written_over_another() -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        claim(a_run(Path("outputs/a")))


def test_another_strategy_is_refused_with_the_word_that_works() -> None:
    remember(a_run(Path("outputs/a")))
    with pytest.raises(ValueError, match=r"strategy=ddp with ckpt_path: .* such as strategy\.kind=ddp\."):
        go_on("ckpt_path=last", "strategy=ddp")
    assert go_on("ckpt_path=last", "strategy.kind=ddp", "trainer.devices=2").run.strategy.kind is Spread.ddp
