"""Conversation and images to model inputs: the only meeting of tokenizer and pixels; training, evaluation and
notebooks share it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepstack_pl.batch import (
    IGNORE_INDEX,
    MultimodalBatch,
    PadSide,
    Reason,
    Record,
    Refused,
    Role,
    Sample,
    Turn,
    collate,
)
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
from deepstack_pl.stacking.mosaic import ImageTables, best_grid, image_tables
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig


class DeepStackProcessor:
    """Makes samples under one plan, for one tower and one tokenizer.

    ``backend`` is what resizes images; it is the machine's choice and not saved with a model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        plan: Plan,
        vision: VisionConfig,
        template: str,
        max_length: int,
        too_long: TooLong = TooLong.cut_text,
        backend: ViewsBackend = ViewsBackend.pil,
    ) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"llm.template={template}: no such template. There are {', '.join(sorted(TEMPLATES))}.")
        self.tokenizer = tokenizer
        self.plan = plan
        self.vision = vision
        self.template = TEMPLATES[template]
        self.max_length = max_length
        self.too_long = too_long
        self.backend = backend
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
        """A training sample: the whole conversation, answers supervised.

        Raises:
            Refused: placeholders and images differ in number, nothing is supervised (``llm.too_long=cut`` alone lets a
                sample pass that a cut left without labels, as published), or it is too long.
        """
        try:
            encoded = encode(record.turns, self.template, self.tokenizer)
        except ValueError as error:
            raise Refused(Reason.conversation, f"sample {record.key!r}: {error}") from error
        sample = self._sample(record, encoded.input_ids, encoded.labels, self.too_long)
        if bool((sample.labels[1:] == IGNORE_INDEX).all()) and not (sample.cut and self.too_long is TooLong.cut):
            raise Refused(*self._nothing_to_learn(sample))
        return sample

    def positions(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]) -> int:
        """The positions of a training sample with images of these sizes (width, height), before anything is cut.

        Raises:
            Refused: its turns cannot be encoded.
        """
        try:
            ids = encode(turns, self.template, self.tokenizer).input_ids
        except ValueError as error:
            raise Refused(Reason.conversation, str(error)) from error
        images = sum(len(self._tables(size).sequence) for size in sizes)
        return len(ids) - sum(token == self.image_token_id for token in ids) + images

    @property
    def positions_digest(self) -> str:
        """SHA-256 of all that `positions` depends on."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            repr(self.template),
            self.plan.digest,
            f"{self.vision.image_size} {self.vision.patch_size}",
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def blank(self, key: str = "", source: str = "", refused: tuple[Reason, str] | None = None) -> Sample:
        """A row that counts nothing: in place of a sample that is refused, or (key "") to fill a batch."""
        pad = self.tokenizer.pad_token_id
        record = Record(key=key, turns=(), images=(), source=source)
        sample = self._sample(record, [pad if isinstance(pad, int) else 0], [IGNORE_INDEX], TooLong.refuse)
        sample.refused = refused
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

    def collate(self, samples: Sequence[Sample | Sequence[Sample]], side: PadSide = PadSide.right) -> MultimodalBatch:
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

    def _tables(self, size: tuple[int, int]) -> ImageTables:
        """What an image of ``size`` becomes."""
        plan, vision = self.plan, self.vision
        grid = best_grid(*size, tile=vision.image_size, tiles=plan.tiles, rule=plan.grid) if plan.tiles else None
        return image_tables(plan, grid, vision.patches_per_side)

    def _nothing_to_learn(self, sample: Sample) -> tuple[Reason, str]:
        if not sample.cut:
            says = f"sample {sample.key!r}: no token is supervised. Give it an answer, or leave it out."
            return Reason.conversation, says
        return Reason.too_long, (
            f"sample {sample.key!r}: {len(sample.input_ids) + sample.cut} positions, and nothing to learn is left of "
            f"it within llm.max_length={self.max_length}. Raise llm.max_length, or shorten it."
        )

    def _sample(self, record: Record, ids: list[int], labels: list[int], too_long: TooLong) -> Sample:
        sample = make_sample(
            record.key,
            ids,
            labels,
            record.images,
            plan=self.plan,
            vision=self.vision,
            image_token_id=self.image_token_id,
            max_length=self.max_length,
            too_long=too_long,
            backend=self.backend,
        )
        sample.source = record.source
        return sample


def generation_inputs(batch: MultimodalBatch) -> dict[str, Tensor]:
    """What ``generate`` takes of a left padded batch."""
    return {name: value for name, value in batch.model_inputs().items() if name not in ("labels", "position_ids")}
