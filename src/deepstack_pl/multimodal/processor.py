"""Conversation and images to model inputs: the only meeting of tokenizer and pixels; training, evaluation and
notebooks share it.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, PadSide, Record, Role, Sample, Turn, collate
from deepstack_pl.language.config import TooLong
from deepstack_pl.language.conversation import (
    TEMPLATES,
    encode,
    encode_prompt,
    image_token_id,
    load_tokenizer,
    save_tokenizer,
)
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig


class DeepStackProcessor:
    """Makes samples under one plan, for one tower and one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        plan: Plan,
        vision: VisionConfig,
        template: str,
        max_length: int,
        too_long: TooLong = TooLong.refuse,
    ) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"llm.template={template}: no such template. There are {', '.join(sorted(TEMPLATES))}.")
        self.tokenizer = tokenizer
        self.plan = plan
        self.vision = vision
        self.template = TEMPLATES[template]
        self.max_length = max_length
        self.too_long = too_long
        self.image_token_id = image_token_id(tokenizer)

    @property
    def tokens_per_view(self) -> int:
        """Tokens of a view in the LLM: fewer than the tower's where the plan pools."""
        return (self.vision.patches_per_side // self.plan.pooling) ** 2

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DeepStackProcessor":
        """The processor of a run's or an exported folder: tokenizer files and config.json."""
        config = DeepStackConfig.from_pretrained(folder)
        return cls(
            load_tokenizer(str(folder)),
            plan=config.typed_plan(),
            vision=config.typed_vision(),
            template=config.template,
            max_length=config.sample_max_length,
            too_long=TooLong(config.sample_too_long),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer; the rest stands in the model's config.json."""
        save_tokenizer(self.tokenizer, folder)

    def prepare(self, record: Record) -> Sample:
        """A training sample: the whole conversation, answers supervised. One whose answers are cut away teaches nothing
        and is counted, as its positions are.

        Raises:
            ValueError: placeholders and images differ in number, nothing is supervised, or it is too long.
        """
        try:
            encoded = encode(record.turns, self.template, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"sample {record.key!r}: {error}") from error
        sample = self._sample(record, encoded.input_ids, encoded.labels, self.too_long)
        if not sample.cut and bool((sample.labels[1:] == IGNORE_INDEX).all()):
            raise ValueError(f"sample {record.key!r}: no token is supervised. Give it an answer, or leave it out.")
        return sample

    def prompt(self, record: Record) -> Sample:
        """A sample for generation: everything before the last answer.

        Raises:
            ValueError: it is too long; a question is never cut, or what is answered would be another one.
        """
        turns = record.turns[:-1] if record.turns[-1].role is Role.assistant else record.turns
        ids = encode_prompt(turns, self.template, self.tokenizer)
        sample = self._sample(record, ids, [IGNORE_INDEX] * len(ids), TooLong.cut)
        if sample.cut:
            raise ValueError(
                f"sample {record.key!r}: its question takes {len(sample.input_ids) + sample.cut} positions, but "
                f"llm.max_length is {self.max_length}. Questions are never cut: raise llm.max_length, or leave it out."
            )
        return sample

    def collate(self, samples: Sequence[Sample], side: PadSide = PadSide.right) -> MultimodalBatch:
        pad = self.tokenizer.pad_token_id
        pad_id = pad if isinstance(pad, int) else 0  # never attended to, never learned
        return collate(
            samples,
            pad_id=pad_id,
            side=side,
            tokens_per_view=self.tokens_per_view,
            patches_per_view=self.vision.patches_per_side**2,
        )

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Sequence[Image.Image]] | Sequence[Image.Image] = ()
    ) -> dict[str, Tensor]:
        """Inputs for ``model.generate``: one question a row, ``<image>`` where an image stands, images in that order.

        ``images`` is one list for one question, a list of lists for several.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [images] if isinstance(text, str) else list(images) or [()] * len(texts)
        if any(isinstance(row, Image.Image) for row in rows):
            raise ValueError("images: give each question a list of images, also where it holds one: [image].")
        if len(rows) != len(texts):
            raise ValueError(
                f"{len(texts)} questions, but image lists for {len(rows)}. Give each question its own list."
            )
        samples = [
            self.prompt(Record(key=f"question {i}", turns=(Turn(Role.user, question),), images=tuple(row)))  # type: ignore[arg-type]
            for i, (question, row) in enumerate(zip(texts, rows, strict=True))
        ]
        return generation_inputs(self.collate(samples, PadSide.left))

    def decode(self, ids: Tensor) -> list[str]:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _sample(self, record: Record, ids: list[int], labels: list[int], too_long: TooLong) -> Sample:
        return make_sample(
            record.key,
            ids,
            labels,
            record.images,
            plan=self.plan,
            vision=self.vision,
            image_token_id=self.image_token_id,
            max_length=self.max_length,
            too_long=too_long,
        )


def generation_inputs(batch: MultimodalBatch) -> dict[str, Tensor]:
    """What ``generate`` takes of a left padded batch."""
    return {name: value for name, value in batch.model_inputs().items() if name not in ("labels", "position_ids")}
