"""Every mode of ``generate`` gives what each prompt alone gives, greedily, token by token."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import IMAGE_TOKEN, MIXED, PLANS, batch_of, prompts, tiny_llm, tiny_model, tiny_vision
from torch import Tensor
from transformers import CompileConfig

from deepstack_pl.batch import PadSide
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.output import CACHE
from deepstack_pl.stacking.config import Operator

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
BEAMS = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
ROWS = MIXED  # text alone beside a full grid, two images and a wide one
IMAGE_IN_ROW_1 = 3 + 7  # the first chunk of 10 ends inside an image of each row that has one


@pytest.fixture(scope="module", params=["deepstack_l", pytest.param("gated_lv", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> DeepStackForConditionalGeneration:
    if request.param != "gated_lv":
        return tiny_model(PLANS[request.param])
    made = tiny_model(replace(PLANS["deepstack_lv"], operator=Operator.gated_add))
    for gate in made.gates.values():
        gate.data.uniform_(0.3, 1.0)
    return made


def new_tokens(
    model: DeepStackForConditionalGeneration, rows: list, side: PadSide = PadSide.left, **how: Any
) -> Tensor:
    batch = batch_of(model, rows, side)
    return model.generate(**prompts(batch), **how)[:, batch.input_ids.shape[1] :]


def one_by_one(model: DeepStackForConditionalGeneration, **how: Any) -> Tensor:
    return torch.cat([new_tokens(model, [row], **how) for row in ROWS])


@pytest.fixture(scope="module")
def alone(model: DeepStackForConditionalGeneration) -> Tensor:
    """What each row is answered by itself, greedily."""
    return one_by_one(model, **GREEDY)


@pytest.mark.parametrize(
    ("side", "how"),
    [
        (PadSide.left, {}),
        (PadSide.right, {}),
        (PadSide.right, {"use_cache": False}),
        (PadSide.left, {"cache_implementation": "static"}),
        (PadSide.left, {"prefill_chunk_size": 1}),
        (PadSide.right, {"prefill_chunk_size": 5}),
        (PadSide.left, {"prefill_chunk_size": IMAGE_IN_ROW_1}),
        (PadSide.left, {"prefill_chunk_size": 10_000}),
        (PadSide.right, {"prefill_chunk_size": 5, "cache_implementation": "static"}),
    ],
    ids=str,
)
def test_a_batch_is_answered_as_each_row_alone(model: Any, alone: Tensor, side: PadSide, how: dict[str, Any]) -> None:
    assert torch.equal(new_tokens(model, ROWS, side, **GREEDY, **how), alone)


@pytest.mark.parametrize("how", [{"prefill_chunk_size": 5}, {"cache_implementation": "static"}], ids=str)
def test_beams_keep_their_images_however_the_prompt_runs(model: Any, how: dict[str, Any]) -> None:
    assert torch.equal(new_tokens(model, ROWS, PadSide.right, **BEAMS, **how), one_by_one(model, **BEAMS))


def test_each_sampled_answer_sees_its_own_images(model: Any, alone: Tensor) -> None:
    """Sampling the likeliest token alone is greedy, in each of the answers."""
    how = {"max_new_tokens": NEW, "do_sample": True, "top_k": 1, "num_return_sequences": 3, "eos_token_id": None}
    sampled = new_tokens(model, ROWS, **how)
    assert torch.equal(sampled, alone.repeat_interleave(3, dim=0))
    torch.manual_seed(0)
    first = new_tokens(model, ROWS, **(how | {"top_k": 0}))
    torch.manual_seed(0)
    assert torch.equal(first, new_tokens(model, ROWS, **(how | {"top_k": 0, "prefill_chunk_size": 4})))
    assert not torch.equal(first, sampled)


def test_logits_of_a_batch_in_chunks_are_those_of_each_row_alone(model: Any) -> None:
    how = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**prompts(batch_of(model, ROWS)), **how, prefill_chunk_size=7).logits
    for number, row in enumerate(ROWS):
        single = model.generate(**prompts(batch_of(model, [row])), **how).logits
        for step in range(NEW):
            torch.testing.assert_close(together[step][number], single[step][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guess", ["prompt lookup", "another model"])
def test_guessed_tokens_change_nothing(model: Any, guess: str) -> None:
    how = (
        {"prompt_lookup_num_tokens": 2}
        if guess == "prompt lookup"
        else {"assistant_model": tiny_model(PLANS["baseline"])}
    )
    assert torch.equal(new_tokens(model, [ROWS[2]], **GREEDY, **how), new_tokens(model, [ROWS[2]], **GREEDY))


def test_prompt_lookup_is_refused_where_it_would_guess_beyond_the_vocabulary() -> None:
    llm = replace(tiny_llm(), architecture=tiny_llm().architecture | {"vocab_size": IMAGE_TOKEN})
    projector = ProjectorConfig(name="mlp")
    model = build_model(PLANS["deepstack_l"], llm, tiny_vision(), projector, seed=0, image_token_id=IMAGE_TOKEN).eval()
    assert new_tokens(model, ROWS, **GREEDY).max() < IMAGE_TOKEN
    with pytest.raises(ValueError, match="vocabulary of 63 tokens"):
        new_tokens(model, [ROWS[2]], **GREEDY, prompt_lookup_num_tokens=3)


def test_a_conversation_goes_on_from_its_cache(model: Any, alone: Tensor) -> None:
    how = GREEDY | {"max_new_tokens": 3}
    batch = batch_of(model, ROWS, PadSide.left)
    first = model.generate(**prompts(batch), **how, return_dict_in_generate=True)
    mask = torch.cat([batch.attention_mask, torch.ones(len(ROWS), 3, dtype=torch.bool)], dim=1)
    longer = prompts(batch) | {"input_ids": first.sequences, "attention_mask": mask}
    second = model.generate(**longer, **how, **{CACHE: getattr(first, CACHE)})
    assert torch.equal(second[:, batch.input_ids.shape[1] :], alone)


def test_the_tower_runs_once_a_call(model: Any) -> None:
    calls: list[int] = []
    handle = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    for how in ({"use_cache": False}, {"prefill_chunk_size": 2}, {"num_beams": 3}):
        new_tokens(model, ROWS, **GREEDY, **how)
    handle.remove()
    assert len(calls) == 3


def test_text_alone_needs_no_visual_arguments(model: Any) -> None:
    rows = [ROWS[0], ([1, 9, 10], [])]
    batch = batch_of(model, rows, PadSide.right)
    ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **GREEDY)
    assert torch.equal(ids[:, batch.input_ids.shape[1] :], new_tokens(model, rows, **GREEDY))
    with pytest.raises(ValueError, match="image placeholders, but no views"):
        model.generate(input_ids=batch_of(model, ROWS[1:2]).input_ids, **GREEDY)


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("chunk", [None, 5])
def test_decoding_that_transformers_compiles_answers_as_without_on_text_first_and_images_after(chunk) -> None:
    """With a static cache it does on a GPU, as CUDA graphs; here what it compiles runs as it was traced."""
    model, traced = tiny_model(PLANS["deepstack_lv"]), []
    compiled = CompileConfig(backend=lambda graph, _: traced.append(graph) or graph.forward, mode=None, fullgraph=False)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    for rows in (MIXED[:1], MIXED):
        inputs = prompts(batch_of(model, rows, PadSide.left))
        ids = model.generate(
            **inputs, **GREEDY, cache_implementation="static", compile_config=compiled, prefill_chunk_size=chunk
        )
        assert torch.equal(ids, model.generate(**inputs, **GREEDY))
    assert traced, "nothing was compiled"
