"""conf/ composes, and what a user misspells is named."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from deepstack_pl.config.errors import sentence
from deepstack_pl.config.load import from_hydra, load, register, save
from deepstack_pl.config.overrides import check, parse
from deepstack_pl.config.run import DryRun, RunConfig
from deepstack_pl.config.schema import Schema
from deepstack_pl.stacking.config import ModelConfig

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(
    (file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name not in ("hydra", "experiment")
)
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
NEEDS = {
    ("projector", "pixel_shuffle"): ["model.pooling=2"],
    **{
        # Pages are drawn for the view's size, and their swatches lie on its pixels: 7 divides 518.
        ("vision", name): [f"data.fine_print.view_size={size}", f"data.fine_print.cells={7 if size == 518 else 4}"]
        for name, size in {
            "clip_l_336": 336,
            "clip_l_336_hf": 336,
            "siglip_so400m_384": 384,
            "siglip_so400m_384_hf": 384,
            "siglip2_so400m_384": 384,
            "siglip2_so400m_384_hf": 384,
            "dinov2_l": 518,
            "dinov2_l_registers": 518,
            "timm_vit_b_16": 224,
            "qwen3_vl": 768,
        }.items()
    },
}


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def run_of(*overrides: str) -> RunConfig:
    check(parse(overrides), Schema((CONF,)))
    return from_hydra(compose("train", list(overrides)))


def refusal(*overrides: str, folders: tuple[Path, ...] = (CONF,)) -> str:
    """The sentence that a user reads."""
    schema = Schema(folders)
    try:
        check(parse(overrides), schema)
        from_hydra(compose("train", list(overrides)))
    except Exception as error:
        text = sentence(error, schema)
        if text is None:
            raise
        return text
    pytest.fail(f"{overrides} was accepted")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    run = run_of(f"{group}={option}", *NEEDS.get((group, option), []))
    filled = getattr(run, group)
    if group == "evaluation" and filled.tasks:
        assert list(filled.tasks) == [option]
    elif not isinstance(filled, dict):
        assert filled.name == option


def test_benchmarks_stand_beside_an_evaluation_of_the_runs_own() -> None:
    run = run_of("evaluation=[quick,textvqa,pope]", "evaluation.tasks.pope.samples=9")
    assert (run.evaluation.name, run.evaluation.every_steps) == ("quick", 200)
    assert list(run.evaluation.tasks) == ["textvqa", "pope"]
    assert run.evaluation.tasks["pope"].samples == 9


def test_a_misspelt_value_of_a_benchmark_is_named_with_the_near_miss() -> None:
    assert "Did you mean evaluation.tasks.pope.samples?" in refusal("evaluation=pope", "evaluation.tasks.pope.smples=9")
    assert "evaluation.tasks.pop" in refusal("evaluation=pope", "evaluation.tasks.pop.samples=9")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    run_of(f"experiment={name}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_asks_and_what_it_costs(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    for word in ("# Question:", "# Claim", "# Cost:", "# Command:"):
        assert word in text


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_is_a_page_of_numbers(group: str, option: str) -> None:
    assert len((CONF / group / f"{option}.yaml").read_text().splitlines()) <= 16


def test_the_defaults_are_deepstack_l_on_tiny_parts() -> None:
    run = run_of()
    assert (run.model.name, run.llm.name, run.vision.name, run.stage.name) == ("deepstack_l", "tiny", "tiny", "scratch")
    assert run.llm.layers == 12


@pytest.mark.parametrize("form", ["{}=2", "+{}=2", "++{}=2"])
def test_a_misspelt_key_is_named_with_the_near_miss(form: str) -> None:
    typed = form.format("model.strat_layer")
    assert refusal(typed) == f"Unknown key model.strat_layer (in '{typed}'). Did you mean model.start_layer?"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("~model.strat_layer", "Did you mean model.start_layer?"),
        ("modle.strat_layer=2", "Did you mean model.start_layer?"),
        ("start_layer=2", "Did you mean model.start_layer?"),
        ("+trainer.max_step=3", "Did you mean trainer.max_steps?"),
        ("trainer.max_step=3", "Did you mean trainer.max_steps?"),
        ("llm.architecture.num_hiden_layers=3", "Did you mean llm.architecture.num_hidden_layers?"),
        ("callbacks.checkpoint.every_step=3", "Did you mean callbacks.checkpoint.every_steps?"),
        ("+modle.x=1", "Did you mean model?"),
        ("hydra.swep.dir=x", "Could not override 'hydra.swep.dir'"),
        ("lm=phi3", "Did you mean llm?"),
        ("model.zzz=1", "model has name, tiles, grid,"),
        ("model.injections=[{layr: 2, group: 1}]", "Did you mean layer?"),
        ("model.dealing=strided2d", "Did you mean strided_2d?"),
        ("model.tiles=abc", "model.tiles: Value 'abc'"),
        ("logger=null", "write ~logger"),
        ("+llm=phi3", "Write it without +"),
        ("model=[baseline", "Cannot read the override 'model=[baseline'"),
        ("dry_run=maybe", "use false, true, step"),
    ],
)
def test_what_is_wrong_with_an_override_is_said(typed: str, says: str) -> None:
    assert says in refusal(typed)


@pytest.mark.parametrize("typed", ["llm=fi3", "llm=tiny,fi3"])
def test_a_misspelt_option_is_named_with_the_near_miss(typed: str) -> None:
    options = ", ".join(sorted(file.stem for file in (CONF / "llm").glob("*.yaml")))
    assert refusal(typed) == f"llm=fi3: no such option; llm has {options}. Did you mean phi3?"


def test_a_misspelt_experiment_is_refused_although_it_is_optional() -> None:
    assert "Did you mean four_arms?" in refusal("experiment=fuor_arms")


def test_an_open_section_takes_a_key_that_is_no_slip() -> None:
    assert run_of("+trainer.accumulate_grad_batches=2").trainer["accumulate_grad_batches"] == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.start_layer=50"], "reach layer 53, but the LLM has 12 layers"),
        (["llm.architecture.num_hidden_layers=3"], "reach layer 4, but the LLM has 3 layers"),
        (["~llm.architecture.num_hidden_layers"], "llm.architecture.num_hidden_layers is not given"),
        (["vision=clip_l_336"], "data.fine_print.view_size=336"),
        (["vision.image_size=33"], "not a multiple of vision.patch_size=8"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["~trainer.max_steps"], "trainer.max_steps=None"),
        (["data.batch_size=0"], "data.batch_size=0"),
        (["evaluation.confidence=95"], "evaluation.confidence=95"),
        (["seed=-1"], "seed=-1: seeds count from 0"),
        (["optim.warmup_ratio=3"], "optim.warmup_ratio=3.0"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]: AdamW takes two values"),
        (["optim.betas=[0.9,1.0]"], "from 0 to below 1"),
        (["evaluation.samples=0"], "evaluation.samples=0"),
        (["evaluation.final_samples=0"], "evaluation.final_samples=0"),
        (["evaluation.max_new_tokens=0"], "evaluation.max_new_tokens=0"),
        (["vision.heads=5"], "vision.heads=5 does not divide vision.width=64"),
        (["data.path=x.json"], "data.path=x.json: data.source=fine_print does not read it. Say data=llava_json"),
        (["data=shards", "data.images=pictures"], "data.images=pictures: data.source=shards does not read it"),
        (["data=shards", "data.shards=x"], "Say a corpus such as data=llava665k"),
        (["data.micro_batch_size=5"], "data.micro_batch_size=5 does not divide data.batch_size=64"),
        (["data.batching=token_budget", "data.micro_batch_size=2"], "there a unit is a micro-batch"),
        (["data.max_refused=2"], "data.max_refused=2.0: a share of samples, from 0 to 1"),
        (["data=shards", "data.stream=webdataset"], "Give stream=webdataset and urls together"),
        (["data=shards", "data.urls=x.tar"], "Give stream=webdataset and urls together"),
        (
            ["data=shards", "data.stream=webdataset", "data.urls=x.tar", "data.batching=token_budget"],
            "knows no lengths",
        ),
        (["data=shards", "data.mixture=[{root: a, weight: 1.0}, {root: b}]"], "Weigh all, or none"),
        (["data=shards", "data.mixture=[{root: a, take: half}]"], "data.mixture[0].take=half: use all, first:N"),
        (["data.mixture=[{root: a}]"], "data.source=fine_print does not read it. Say data=shards"),
        (["llm.init=pretrained"], "llm.checkpoint is not given"),
        (["vision.init=pretrained"], "vision.open_clip_model"),
        (["logger=[tensorboard,csv]", "~logger"], "~logger: there is no single logger to leave out"),
        (["ckpt_path=last"], "on the command line alone"),
        (["~model"], "model.name"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], says: str) -> None:
    assert says in refusal(*overrides)


@pytest.mark.parametrize(("given", "trial"), [("true", DryRun.true), ("step", DryRun.step), ("false", DryRun.false)])
def test_dry_run_is_read_whatever_yaml_makes_of_it(given: str, trial: DryRun) -> None:
    assert run_of(f"dry_run={given}").trial is trial


def test_a_key_that_hydra_let_pass_is_caught_by_the_second_merge() -> None:
    composed = compose("train", ["+model.strat_layer=2"])
    with pytest.raises(Exception, match="strat_layer"):
        from_hydra(composed)


def test_a_saved_run_loads_equal_and_takes_overrides(tmp_path: Path) -> None:
    run = run_of("model=deepstack_lv", "seed=3")
    save(run, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", []) == run
    assert load(tmp_path / "config.yaml", ["trainer.max_steps=7"]).trainer["max_steps"] == 7


def test_options_come_from_the_users_own_folder_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\n")
    assert "mine" in Schema((CONF, tmp_path)).options("model")
    assert "Did you mean mine?" in refusal("model=mien", folders=(CONF, tmp_path))


def test_an_option_in_both_folders_is_refused_with_both_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = tmp_path / "model" / "deepstack_l.yaml"
    mine.write_text("name: deepstack_l\n")
    with pytest.raises(ValueError, match=re.escape(f"{mine} and {CONF / 'model' / 'deepstack_l.yaml'}")):
        Schema((CONF, tmp_path)).refuse_namesakes()
    mine.rename(tmp_path / "model" / "mine.yaml")
    Schema((CONF, tmp_path)).refuse_namesakes()


def test_the_typed_tree_is_registered_once() -> None:
    composed = compose("train")
    assert OmegaConf.get_type(composed, "model") is ModelConfig
    assert OmegaConf.is_struct(composed)


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="three") as caught:
        int("three")
    assert sentence(caught.value, Schema((CONF,))) is None


def test_a_refusal_in_a_data_worker_is_one_sentence() -> None:
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "/x/deepstack_pl/vision/images.py", line 3, in decode_image\n    raise ValueError(\n'
        "ValueError: train/a.tar:7.png: not an image. Write it again.\n"
    )
    assert sentence(error, Schema((CONF,))) == "train/a.tar:7.png: not an image. Write it again."


def test_what_the_system_says_of_a_file_is_one_sentence_also_from_a_data_worker() -> None:
    schema = Schema((CONF,))
    with pytest.raises(OSError, match="No such file") as caught:
        Path("nowhere/at.all").read_bytes()
    assert sentence(caught.value, schema) == "nowhere/at.all: No such file or directory."
    full = OSError(errno.ENOSPC, "No space left on device")  # of a file that is open: it has no name
    assert sentence(full, schema) == (
        "No space left on device. Make room. A run that has saved a checkpoint goes on with ckpt_path=ITS_FOLDER; for "
        "everything else give the same command again."
    )
    error = OSError(
        "Caught NotThere in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "/x/deepstack_pl/data/download.py", line 3, in _retry\n    raise NotThere(\n'
        "deepstack_pl.data.download.NotThere: https://host/a.tar: there is no such file (404). Upload it.\n"
    )
    assert sentence(error, schema) == "https://host/a.tar: there is no such file (404). Upload it."


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: 'cut")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged .*Restore it"):
        load(tmp_path / "config.yaml", [])


def test_a_block_of_no_width_is_refused() -> None:
    assert "vision.mlp_ratio=0.0: blocks are wider inside by it" in refusal("vision.mlp_ratio=0")
