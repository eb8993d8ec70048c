"""Whatever is put around a model hands the groups on, once each: the same losses, gradients and record.

Run as a program it compiles the whole model: types that are checked at run time, as in tests, break graphs.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_run import Pages, small_model, small_module, small_processor, small_trainer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.data.config import DataConfig
from deepstack_pl.stacking.config import Host, InjectionConfig, ModelConfig
from deepstack_pl.training.compiling import compile_blocks
from deepstack_pl.training.datamodule import DeepStackDataModule

BOTH_HOSTS = ModelConfig(
    name="deepstack_lv", start_layer=1, injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)]
)


def batch_of(*records: Record) -> MultimodalBatch:
    processor = small_processor(BOTH_HOSTS)
    return processor.collate([processor.prepare(record) for record in records])


def words(count: int) -> Record:
    return Record(key="words", turns=(Turn(Role.user, "word " * count), Turn(Role.assistant, "no")), images=())


TEXT, SEEN = batch_of(words(9), words(4)), batch_of(Pages()[0], words(6), Pages()[5])


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def adapted(model: Any) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)"))
    return wrapped.requires_grad_(True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": lambda model: DistributedDataParallel(model, find_unused_parameters=False),
    "peft": adapted,
}


def answer(model: Any, batch: MultimodalBatch) -> tuple[Any, dict[str, Tensor]]:
    """The output, and the gradient of each parameter that the bare model has."""
    output = model(**batch.model_inputs(), use_cache=False, record=True)
    output.loss.backward()
    words = ("module.", "base_model.model.", "base_layer.")
    found = {}
    for name, parameter in model.named_parameters():
        for word in words:
            name = name.replace(word, "")
        if parameter.grad is not None and "lora_" not in name:
            found[name] = parameter.grad.clone()
    model.zero_grad()
    return output, found


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_hands_every_group_on_once(name: str, tmp_path: Path) -> None:
    plain = small_model(BOTH_HOSTS).eval()
    expected = [answer(plain, batch) for batch in (SEEN, TEXT, SEEN)]
    with one_process(tmp_path):
        model = WRAPPERS[name](small_model(BOTH_HOSTS).eval())
        for batch, (wanted, gradients) in zip((SEEN, TEXT, SEEN), expected, strict=True):
            output, found = answer(model, batch)
            torch.testing.assert_close(output.logits, wanted.logits, atol=1e-6, rtol=1e-5)
            assert [trace.injection for trace in output.record] == [trace.injection for trace in wanted.record]
            assert len(output.record) == 8
            for trace, its in zip(output.record, wanted.record, strict=True):
                assert torch.equal(trace.touched, its.touched)
            assert found.keys() == gradients.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_lightnings_loop_hands_every_group_on_once(tmp_path: Path) -> None:
    module = small_module(BOTH_HOSTS, steps=1)
    module.configure_model()
    calls: list[Any] = []
    forward = module.network.forward
    module.network.forward = lambda **inputs: calls.append(forward(**inputs, record=True)) or calls[-1]
    data = DeepStackDataModule(
        Pages(), Pages(4), small_processor(BOTH_HOSTS), DataConfig(name="x", batch_size=4, workers=0), 0, 1
    )
    small_trainer(tmp_path, 1).fit(module, datamodule=data)
    assert [len(output.record) for output in calls] == [8]
    assert all(trace.touched.any() for trace in calls[0].record)


@pytest.mark.slow  # it compiles
def test_a_model_that_was_compiled_on_text_alone_sees_the_images_that_come_after() -> None:
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[2] / "src"), str(here.parents[1])])}
    done = subprocess.run([sys.executable, str(here)], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def test_blocks_that_were_compiled_on_text_alone_see_the_images_that_come_after() -> None:
    hold_images_after_text("blocks")


def hold_images_after_text(how: str) -> None:
    """Elsewhere "no features" is compiled in while warming up, and images are left out from then on, in silence."""

    def losses(of: Any, batch: MultimodalBatch) -> Tensor:
        return of(**batch.training_inputs(), use_cache=False).losses

    plain = small_model(BOTH_HOSTS).train()
    seen, text = losses(plain, SEEN), losses(plain, TEXT)  # images first
    (2 * seen.sum() + 2 * text.sum()).backward()
    torch._dynamo.reset()
    model: Any = small_model(BOTH_HOSTS).train()
    if how == "blocks":
        compile_blocks(model, backend="aot_eager")
    else:
        model = DistributedDataParallel(torch.compile(model, backend="eager"))
    for batch, expected in ((TEXT, text), (SEEN, seen), (TEXT, text), (SEEN, seen)):
        found = losses(model, batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        found.sum().backward()
    for table in ("group_rows", "vit_rows"):
        blind = replace(SEEN, **{table: torch.full_like(getattr(SEEN, table), -1)})
        assert (losses(model, blind) - seen).abs().max() > 1e-3, "groups matter in each host"
    named = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        its = named[name.replace("_orig_mod.", "").replace("module.", "")]
        if its.grad is not None:
            torch.testing.assert_close(parameter.grad, its.grad, atol=1e-5, rtol=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as store, one_process(Path(store)):
        hold_images_after_text("whole model")
