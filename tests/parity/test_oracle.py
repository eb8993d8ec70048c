"""The oracle that ablations and rows of method E are held to is itself the published code, where that is right."""

from pathlib import Path

import pytest
import torch
from oracle import forward_slowly
from PIL import Image
from torch import Tensor

from deepstack_pl.inspection.parity import build
from deepstack_pl.inspection.stored import cases_of, read_case

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", cases_of(GOLDEN))
def test_the_oracle_gives_the_published_layer_inputs_and_logits(name: str) -> None:
    case = read_case(GOLDEN, name)
    model = build(case, "eager")
    for row, (ids, file) in enumerate(zip(case.ids, case.images, strict=True)):
        inputs: list[Tensor] = []
        images = [Image.open(file).convert("RGB")] if file else []
        with torch.no_grad():
            logits, _ = forward_slowly(model, ids, images, case.published["tokenizer_model_max_length"], inputs)
        assert case.logits is not None
        torch.testing.assert_close(logits, case.logits[row, : len(logits)], atol=1e-5, rtol=0)
        for layer, expected in case.layer_inputs.items():
            torch.testing.assert_close(inputs[layer], expected[row, : len(logits)], atol=2e-5, rtol=0)
