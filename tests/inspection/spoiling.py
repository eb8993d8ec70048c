"""Processors whose batches are spoilt on purpose, and what a receipt says of them."""

from collections.abc import Callable

import pytest
from small_run import LLM, STACKED, VISION, small_processor

from deepstack_pl.batch import MultimodalBatch, PadSide
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import ReceiptError
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig


def failure(model, processor: DeepStackProcessor | None = None, config: ModelConfig = STACKED) -> str:
    """The message of a receipt that must fail."""
    receipt = take_receipt(model, processor or small_processor(config))
    assert not receipt.ok
    with pytest.raises(ReceiptError) as caught:
        receipt.require()
    return str(caught.value)


class Broken(DeepStackProcessor):
    """A processor whose batches are spoilt by ``spoil``."""

    @staticmethod
    def spoil(batch: MultimodalBatch) -> None:
        raise NotImplementedError

    def collate(self, samples, side=PadSide.right):
        batch = super().collate(samples, side)
        self.spoil(batch)
        return batch


def broken(spoil: Callable[[MultimodalBatch], None], config: ModelConfig = STACKED) -> DeepStackProcessor:
    kind = type("Spoilt", (Broken,), {"spoil": staticmethod(spoil)})
    processor = small_processor(config)
    return kind(processor.tokenizer, plan=processor.plan, vision=VISION, template="shipped", max_length=LLM.max_length)
