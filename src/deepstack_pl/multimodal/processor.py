"""Conversation and images to model inputs: the only meeting of tokenizer and pixels; training, evaluation, notebooks
and plain transformers share it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

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
from deepstack_pl.language.chat_template import chat_template
from deepstack_pl.language.config import TooLong
from deepstack_pl.language.conversation import (
    IMAGE,
    TEMPLATES,
    encode,
    encode_prompt,
    image_token_id,
    load_tokenizer,
    save_tokenizer,
)
from deepstack_pl.multimodal.chat import Asked, Images, Message, conversations, questions, without_images
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.stacking.mosaic import ImageTables, best_grid, image_tables
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig


class DeepStackProcessor(ProcessorMixin):
    """Makes samples under one plan, for one tower and one tokenizer.

    ``backend`` is what resizes images; it is the machine's choice and not saved with a model.
    """

    image_token = IMAGE

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
        super().__init__(tokenizer, chat_template=chat_template(TEMPLATES[template]))
        self.tokenizer = tokenizer
        tokenizer.chat_template = self.chat_template  # its own, if it had one, is not what the model learned
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

    @property
    def model_input_names(self) -> list[str]:
        """What inputs for ``generate`` hold."""
        return [*generation_inputs(self.collate([self.blank()]))]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, folder: str | Path, **options: Any
    ) -> "DeepStackProcessor":
        """The processor of a run's or an exported folder: tokenizer files and config.json.

        ``options`` are transformers' own, as ``revision``.
        """
        config = DeepStackConfig.from_pretrained(folder, **options)
        return cls(
            load_tokenizer(str(folder), **options),
            plan=config.typed_plan(),
            vision=config.typed_vision(),
            template=config.template,
            max_length=config.sample_max_length,
            too_long=TooLong(config.sample_too_long),
        )

    def save_pretrained(self, folder: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the tokenizer, with the template as its chat template; the rest stands in the model's config.json."""
        save_tokenizer(self.tokenizer, folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for people."""
        said = {"template": self.template.name, "max_length": self.max_length, "too_long": self.too_long.value}
        return {"processor_class": type(self).__name__, **said, "plan": self.plan.to_dict()}

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
        return self._uncut(record, encode_prompt(turns, self.template, self.tokenizer))

    def _uncut(self, record: Record, ids: list[int]) -> Sample:
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

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        text: str | Sequence[str],
        images: Images | None = None,
        *,
        return_tensors: str = "pt",
        padding: bool | str = True,
    ) -> BatchFeature:
        """Inputs for ``model.generate``: one question a row, ``<image>`` where an image stands, images in that order.

        A text that begins as the template does is a prompt that `apply_chat_template` wrote, and is taken as it stands.
        ``images`` is one list for one text, a list of lists for several.
        """
        _check_form(return_tensors, padding)
        return self._inputs(questions(text, images, self.template, self.tokenizer))

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        padding: bool | str = True,
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """One conversation, or several, in the model's template: the string, or (``tokenize``) inputs for ``generate``.

        A part of a message is ``{"type": "text", "text": ...}`` or ``{"type": "image", "image": ...}``: a PIL image, or
        the path of a file. Each part is a line.

        Raises:
            ValueError: a conversation that the template cannot write, or one that ``generate`` cannot answer.
        """
        single = isinstance(conversation[0], Mapping)
        rows: list[Any] = [conversation] if single else list(conversation)
        if not tokenize:
            return self.tokenizer.apply_chat_template(
                without_images(rows[0]) if single else [without_images(row) for row in rows],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
            )
        _check_form(**{"return_tensors": return_tensors, "padding": padding, **(processor_kwargs or {})})
        if continue_final_message:
            raise ValueError("continue_final_message=True continues the string of an answer: say tokenize=False.")
        asked = conversations(rows, self.template, self.tokenizer, to_answer=add_generation_prompt)
        inputs = self._inputs(asked)
        return inputs if return_dict else inputs["input_ids"]

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, ids: Tensor, *, skip_special_tokens: bool = True
    ) -> str | list[str]:
        """Text of generated ids, one string a row; special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _inputs(self, asked: Sequence[Asked]) -> BatchFeature:
        samples = [self._uncut(record, ids) for record, ids in asked]
        return BatchFeature(generation_inputs(self.collate(samples, PadSide.left)))

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


def _check_form(return_tensors: str | None, padding: bool | str) -> None:
    """Refuse what would give anything but padded tensors: rows of one batch share their slots."""
    if return_tensors != "pt" or padding not in (True, "longest"):
        raise ValueError(
            f"return_tensors={return_tensors!r} padding={padding!r}: inputs are padded torch tensors. Leave both out, "
            "or say 'pt' and True."
        )


AutoProcessor.register(DeepStackConfig, DeepStackProcessor, exist_ok=True)
