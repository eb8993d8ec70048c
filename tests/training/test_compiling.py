"""compile=true: the same numbers, and few graphs for whatever comes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import LLM, STACKED, Pages, small_model, small_processor
from torch._dynamo.utils import counters

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.language.config import Attention
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Host, ModelConfig
from deepstack_pl.training.compiling import compile_blocks
from deepstack_pl.training.config import Checkpointing
from deepstack_pl.training.sharding import checkpoint_activations

IN_THE_TOWER = ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0)


def mixed(plan: ModelConfig = STACKED, *, packed: bool = False) -> list[MultimodalBatch]:
    """Text alone, one image, several, in rows of many lengths and batches of many sizes."""
    processor, pages = small_processor(plan), Pages(24)

    def text(words: int) -> Record:
        return Record(
            key=f"{words} words", turns=(Turn(Role.user, "word " * words), Turn(Role.assistant, "no")), images=()
        )

    def album(*numbers: int) -> Record:
        images = tuple(image for number in numbers for image in pages[number].images)
        turns = Turn(Role.user, "<image>" * len(images) + "Which?"), Turn(Role.assistant, "red")
        return Record(key=f"album {numbers}", turns=turns, images=images)

    groups: list[list[Record]] = [
        [text(3)],
        [pages[0]],
        [text(9), text(2)],
        [pages[1], text(20)],
        [album(1, 2), pages[3], text(5)],
        [album(4, 5, 6)],
        [pages[7], pages[8], pages[9], text(1)],
        [text(31)],
        [album(2, 9), album(3, 4)],
        [text(7), text(8), pages[10], pages[11], album(1, 9)],
    ]
    samples = [[processor.prepare(record) for record in group] for group in groups]
    return [processor.collate([row] if packed else row) for row in samples]


def losses_and_gradients(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> list[torch.Tensor]:
    model.zero_grad()
    losses = model(**batch.training_inputs(), use_cache=False).losses
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compiled(plan: ModelConfig = STACKED, how: Checkpointing = Checkpointing.none, **llm: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    model = small_model(plan, replace(LLM, **llm)).train()
    checkpoint_activations(model, how)
    compile_blocks(model, backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "how",
    [
        Checkpointing.full,
        pytest.param(Checkpointing.none, marks=pytest.mark.slow),
        pytest.param(Checkpointing.selective, marks=pytest.mark.slow),
    ],
    ids=lambda how: how.name,
)
@pytest.mark.parametrize("plan", [STACKED, IN_THE_TOWER], ids=lambda plan: plan.name)
def test_compiled_blocks_give_the_same_losses_and_gradients(plan: ModelConfig, how: Checkpointing) -> None:
    plain, model = small_model(plan).train(), compiled(plan, how)
    for batch in mixed(plan)[3:5]:
        for found, expected in zip(losses_and_gradients(model, batch), losses_and_gradients(plain, batch), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 2, "one of the tower, one of the LLM"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["rows of one", "packed"])
def test_a_mixed_stream_compiles_a_handful_of_graphs_and_then_no_more(packed: bool) -> None:
    """One row or several, masked or not, images or none; every length and number of views shares a graph."""
    model, batches = compiled(), mixed(packed=packed)
    for batch in batches[:9]:
        losses_and_gradients(model, batch)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 8
    for batch in batches[9:] + batches:
        losses_and_gradients(model, batch)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_one_model_takes_text_images_and_packed_rows_in_turns_by_a_handful_of_graphs() -> None:
    model = compiled()
    stream = [batch for pair in zip(mixed(), mixed(packed=True), strict=True) for batch in pair]
    assert {batch.packed for batch in stream} == {True, False}
    for batch in stream:
        losses_and_gradients(model, batch)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 12
    for batch in stream[::-1]:
        losses_and_gradients(model, batch)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_without_gradients_blocks_run_as_written() -> None:
    model, processor = compiled(), small_processor()
    batch = processor.collate([processor.prompt(Pages()[0])])
    with torch.no_grad():
        model(**batch.model_inputs(), use_cache=False)
    assert not counters["stats"]["unique_graphs"]
    assert model.config.text_config._attn_implementation == Attention.sdpa.value
