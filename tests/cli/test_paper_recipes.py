"""The paper's two stages, as conf/experiment writes them down."""

from pathlib import Path

import pytest
from test_memory import built
from tiny_run import CONF, run_of

from deepstack_pl.cli import memory
from deepstack_pl.cli.schedule import expected_length
from deepstack_pl.config.run import RunConfig
from deepstack_pl.multimodal.build import parts
from deepstack_pl.stacking.config import Host
from deepstack_pl.training.config import Spread
from deepstack_pl.training.memory import predict
from deepstack_pl.training.parts import optimizer_groups

RATES = {
    "llava_pretrain": {"projector": 1e-3},
    "llava_finetune": {"projector": 2e-5, "llm": 2e-5},
    "llava_finetune_vit": {"vision": 2e-6, "projector": 2e-5, "llm": 2e-5},
}
STEPS = {
    "llava_pretrain": "2,179 steps of 256, 1 epoch of 557,872 samples.",
    "llava_finetune": "5,195 steps of 128, 1 epoch of 665,042 samples.",
    "llava_finetune_vit": "5,195 steps of 128, 1 epoch of 665,042 samples.",
}


@pytest.mark.parametrize("name", RATES)
def test_every_rate_that_is_written_reaches_the_parameters_it_is_for(name: str) -> None:
    run = run_of(f"experiment={name}")
    model = built(run, "meta")
    groups = optimizer_groups(model, run.stage, run.optim.weight_decay)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    reachable = {id(p) for p in model.parameters()} - {id(model.get_parameter(n)) for n in model.unreachable()}
    for part, named in parts(model).items():
        for parameter_name, parameter in named:
            expected = RATES[name].get(part) if id(parameter) in reachable else None
            assert rates.get(id(parameter)) == expected, parameter_name


@pytest.mark.parametrize("name", RATES)
def test_the_rest_is_the_paper_s(name: str) -> None:
    run = run_of(f"experiment={name}")
    assert expected_length(run) == STEPS[name]
    assert (run.optim.warmup_ratio, run.optim.weight_decay) == (0.03, 0.0)
    assert (run.model.host is Host.vit) is (name == "llava_finetune_vit")
    assert run.strategy.kind is Spread.fsdp
    for devices in (1, 2, 4, 8):
        run.data.accumulation(devices)


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_it_takes_the_memory_that_it_says(name: str) -> None:
    run: RunConfig = run_of(f"experiment={name}")
    devices, batch = run.trainer["devices"], memory.longest_batch(run)
    found = predict(
        built(run, "meta"), batch, run.trainer["precision"], gpu=True, strategy=run.strategy, shares=devices
    )
    for text in (CONF / "experiment" / f"{name}.yaml", CONF.parent / "docs" / "scale.md"):
        assert f"{found.total / 2**30:.1f} GiB" in Path(text).read_text(), text
