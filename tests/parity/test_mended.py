"""Where the published code is wrong, this one is right: the rows of method E, one by one, against the oracle.

Each test says what the published code does, and what holds here. What samples cost and teach (E17, E23 to E25) is in
test_mended_samples.py, what is odd and kept (E10 to E14, E18) in test_kept.py. Other tests hold E7 (the tower's own
learning rate, tests/training), E20 (every setting can be said, tests/config), E21 (the vocabulary is left alone,
test_cases.py, whose placeholder is no id of it), and more of E6 (test_convert.py).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ablations import (
    ARMS,
    HD,
    PLAIN,
    Arm,
    L,
    V,
    assert_like_the_oracle,
    batch_for,
    logits_of,
    model_of,
    samples_of,
)
from oracle import forward_slowly
from safetensors import safe_open
from tiny import MIXED, prompts, tiny_llm, tiny_vision
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor

from deepstack_pl.batch import PadSide
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.stacking.config import Host, Newline, Overflow

TEXT, ONE, TWO, WIDE = MIXED
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_e1_text_row_before_an_image_row_gets_no_features_and_the_image_row_its_own(name: str) -> None:
    """Published: the n-th image token takes the n-th *sample*'s features, here the text row's dummy."""
    model = model_of(PLAIN[name])
    rows = [TEXT, ONE, TEXT, WIDE]
    assert_like_the_oracle(model, rows, PadSide.right)
    batch = batch_for(model, rows)
    with torch.no_grad():
        record = model(**batch.model_inputs(), record=True).record
    for trace in record:
        if trace.injection.host is Host.llm:
            assert not trace.touched[0].any()
            assert not trace.touched[2].any()
            assert trace.touched[1].any()
    # It can fail: with the features of the row before, as published, the image row's logits are others.
    shifted = [TEXT, (ONE[0], WIDE[1])]
    assert (logits_of(model, shifted)[1][-1] - logits_of(model, [TEXT, ONE])[1][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["l", "hd"])
def test_e2_second_image_of_a_row_is_stacked_where_it_stands_after_expansion(name: str) -> None:
    """Published: places are counted before expansion, so that the second image's group lands inside the first."""
    model = model_of(PLAIN[name])
    batch = batch_for(model, [TWO])
    with torch.no_grad():
        record = model(**batch.model_inputs(), record=True).record
        visual = forward_slowly(model, *TWO)[1]
    assert torch.equal(record[0].touched[0], visual)
    assert_like_the_oracle(model, [TWO, (TWO[0], TWO[1][::-1])], PadSide.right)


@pytest.mark.parametrize("name", ["l", "hd", "string_leaving_out"])
def test_e3_left_padding_moves_no_injection_where_rows_grow_by_different_lengths(name: str) -> None:
    """Published: right only if every row grows equally; a text row or HD's lengths shift every place."""
    made = Arm(replace(ARMS["string_raster"].plan, groups=4)) if name == "string_leaving_out" else PLAIN[name]
    model = model_of(made)
    rows = [TEXT, TWO, ONE, WIDE]
    growth = [len(s.input_ids) - len(ids) for s, (ids, _) in zip(samples_of(model, rows), rows, strict=True)]
    assert len(set(growth)) >= 3
    assert_like_the_oracle(model, rows, PadSide.left)
    batch = batch_for(model, rows, PadSide.left)
    for positions, mask in zip(batch.position_ids, batch.attention_mask, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))
    new = model.generate(**prompts(batch), **GREEDY)[:, batch.input_ids.shape[1] :]
    for row, (ids, images) in enumerate(rows):
        with torch.no_grad():
            answer = new[row, :2].tolist()
            assert forward_slowly(model, ids, images)[0][-1].argmax() == answer[0]
            assert forward_slowly(model, [*ids, answer[0]], images)[0][-1].argmax() == answer[1]


@pytest.mark.parametrize("name", ["l", "v", "hd"])
@pytest.mark.parametrize("how", ["beams", "sequences"])
def test_e4_beams_and_returned_sequences_keep_their_image(name: str, how: str) -> None:
    """Published: embeddings are repeated and places are not, so that copies of a row go without, or take another's."""
    model = model_of(PLAIN[name])
    arguments = GREEDY | (
        {"num_beams": 3, "num_return_sequences": 2}
        if how == "beams"
        else {"do_sample": True, "top_k": 1, "num_return_sequences": 3}  # samples from one token: greedy
    )
    copies = int(arguments["num_return_sequences"])
    batch = batch_for(model, MIXED, PadSide.left)
    together = model.generate(**prompts(batch), **arguments)[:, batch.input_ids.shape[1] :]
    for row, case in enumerate(MIXED):
        alone = batch_for(model, [case], PadSide.left)
        expected = model.generate(**prompts(alone), **(arguments if how == "beams" else GREEDY))
        new = expected[:, alone.input_ids.shape[1] :].expand(copies, -1)
        assert torch.equal(together[copies * row : copies * (row + 1)], new)


class _Broken(LogitsProcessor):
    """Raises after the prompt has been read."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken")
        return scores


@pytest.mark.parametrize("name", ["l", "hd"])
def test_e5_an_error_in_generate_leaves_no_state_for_the_next_forward(name: str) -> None:
    """Published: features are parked on the module, and an unrelated forward after an error is given them."""
    model = model_of(PLAIN[name])
    batch, text = batch_for(model, [ONE], PadSide.left), batch_for(model, [TEXT])
    before = logits_of(model, [TEXT]), logits_of(model, [WIDE])
    attributes = {key: sorted(vars(module)) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**prompts(batch), **GREEDY, nonsense=1)
    for after in (0, 1):
        with pytest.raises(RuntimeError, match="broken"):
            model.generate(**prompts(batch), **GREEDY, logits_processor=[_Broken(after)])
    with torch.no_grad():
        plain = model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits[0]
    torch.testing.assert_close(plain, before[0][0], atol=1e-6, rtol=0)
    assert torch.equal(logits_of(model, [TEXT])[0], before[0][0])
    assert torch.equal(logits_of(model, [WIDE])[0], before[1][0])
    assert {key: sorted(vars(module)) for key, module in model.named_modules()} == attributes


def test_e5_forwards_of_several_threads_do_not_mix() -> None:
    """Published: one place on the module for all callers."""
    model = model_of(PLAIN["l"])
    cases = [TEXT, ONE, TWO, WIDE] * 4
    expected = [logits_of(model, [case])[0] for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda case: logits_of(model, [case])[0], cases), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["v", "hd"])
def test_e6_e22_e8_a_checkpoint_gives_back_its_tuned_tower_and_its_newline_whatever_its_folder_is_called(
    name: str, tmp_path: Path
) -> None:
    """Published: a tuned tower is replaced by the original CLIP at load, pre-training loses tower and newline, and a
    path with "llava" in it selects another class.
    """
    model = model_of(PLAIN[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("language_model"):
                parameter.add_(0.01)  # tuned
    folder = tmp_path / "llava-v1.6-vicuna"
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert ("image_newline" in file.keys()) == (name == "hd")  # noqa: SIM118 - no dictionary
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, DeepStackForConditionalGeneration)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_e9_hd_from_a_plain_start_owns_a_newline_that_learns() -> None:
    """Published: HD from a plain LLM ends in an AttributeError, nobody having made the newline."""
    model = model_of(PLAIN["hd"])
    assert model.image_newline is not None
    assert model.image_newline.abs().sum() > 0
    model(**batch_for(model, [ONE]).model_inputs()).loss.backward()
    assert model.image_newline.grad is not None
    assert model.image_newline.grad.abs().sum() > 0


def test_e9_hd_starts_from_the_weights_of_a_run_without_newlines(tmp_path: Path) -> None:
    """Its projector, tower and LLM are taken over; the newline, which that run has none of, stays as it was drawn."""
    plain, model = model_of(PLAIN["l"], seed=1), model_of(PLAIN["hd"], seed=2)
    drawn = model.image_newline.clone()
    plain.save_pretrained(tmp_path)
    assert load_weights(model, tmp_path) == ["image_newline"]
    assert torch.equal(model.image_newline, drawn)
    assert torch.equal(model.projector[0].weight, plain.projector[0].weight)


def test_e15_no_step_looks_at_numbers_to_know_where_to_go() -> None:
    """Published: a loop over images and groups with tensors as bounds, which waits for the device each time. Tensors
    without numbers pass through here.
    """
    model = model_of(PLAIN["hd"])
    empty = build_model(
        HD, tiny_llm(), tiny_vision(), ProjectorConfig(name="mlp"), seed=0, image_token_id=63, device="meta"
    )
    batch = batch_for(model, MIXED)
    batch.attention_mask = torch.ones_like(batch.attention_mask)
    inputs = {k: v for k, v in batch.to("meta").model_inputs().items() if k not in ("labels", "attention_mask")}
    assert empty(**inputs).logits.shape == (*batch.input_ids.shape, 64)


CRASHES = {  # in the published code, each by an exception of its own
    "2d_scaledown": ARMS["2d_scaledown"],
    "scaledown_clip with stacking": Arm(replace(L, pooling=2, start_layer=2)),
    "twoviews_unshare": ARMS["twoviews_unshare"],
    "hires_local": ARMS["hires_local"],
    "deepstack_vit on grids that are not full": Arm(V),
    "deepstack_vit in HD": ARMS["hd_and_v"],
    "string in HD": Arm(replace(HD, groups=0, newline=Newline.rows)),
    "global_and_local in HD": Arm(
        replace(HD, injections=ARMS["global_and_local"].plan.injections, start_layer=2), before={}
    ),
}


@pytest.mark.parametrize("name", CRASHES)
@pytest.mark.parametrize("side", list(PadSide))
def test_e16_what_crashes_in_the_published_code_works(name: str, side: PadSide) -> None:
    assert_like_the_oracle(model_of(CRASHES[name]), MIXED, side)


def test_e16_a_tower_start_beyond_its_depth_is_a_sentence() -> None:
    """Published: no start is a TypeError, and a start too late drops groups in silence."""
    late = replace(V, start_layer=2)
    with pytest.raises(ValueError, match="feature is read after 3 blocks, so 3 is the last place"):
        model_of(Arm(late))
    model = model_of(Arm(replace(late, overflow=Overflow.drop)))
    assert [i.layer for i in model.plan.dropped] == [4, 5]
    assert_like_the_oracle(model, MIXED, PadSide.right)


def test_e19_the_auto_class_builds_the_model_once_and_as_itself(tmp_path: Path) -> None:
    """Published: for Phi the mixin is registered, and the model is built twice."""
    made = Arm(HD)
    model_of(made).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is DeepStackForConditionalGeneration
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in model_of(made).named_parameters()]
