"""A loaded model that answers: several conversations in one batch, each heard while it is written."""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from deepstack_pl.batch import PadSide, Record, Sample
from deepstack_pl.inspection.probe import without_groups
from deepstack_pl.language.ends import stop_ids
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor, generation_inputs
from deepstack_pl.serving.config import Settings
from deepstack_pl.serving.reading import Ended, Row, Streamer


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A conversation that waits for its answer, already as the model reads it: pictures are views.

    Attributes:
        stop: strings that end the answer; they are left out of it.
    """

    sample: Sample
    max_tokens: int
    stop: tuple[str, ...]
    settings: Settings


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    finish: ``stop`` (the model, or a stop string, ended it), ``length`` or ``cancelled``.
    prompt_tokens: positions of the conversation, those of pictures included.
    tokens: that were written, the one that ended it included.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


class Session:
    """A run's or an exported folder on one device. Its weights and modes never change.

    Questions are made by any thread, answers by one at a time.
    """

    def __init__(self, model: DeepStackForConditionalGeneration, processor: DeepStackProcessor, name: str) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self.plan = processor.plan
        self._ends = stop_ids(processor.tokenizer, processor.template)
        self._reader = deepcopy(processor.tokenizer)  # tokens are read while another thread writes a prompt's
        self._preparing = threading.Lock()
        self._answering = threading.Lock()
        # Beyond its last position an LLM answers nonsense, or not at all; a few families have no last one.
        config, positions = model.language_model.config, "max_position_embeddings"
        self._room = config.to_dict().get(config.attribute_map.get(positions, positions))

    @classmethod
    def load(cls, folder: Path, device: str) -> "Session":
        """The model of ``folder`` on ``device``: a name of torch's, or ``auto``.

        Raises:
            ValueError: it does not hold this model's weights, or there is no such device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--device {device}: {str(error).splitlines()[0]}. Leave it out, or name one that is here."
            ) from error
        model = DeepStackForConditionalGeneration.from_pretrained(folder)
        return cls(model.to(device), DeepStackProcessor.from_pretrained(folder), folder.resolve().name)

    def question(
        self, record: Record, *, max_tokens: int, stop: Sequence[str] = (), settings: Settings | None = None
    ) -> Question:
        """``record`` up to its last question, with the pictures cut into views. Its answer has at most ``max_tokens``,
        and as many as the LLM has positions left.

        Raises:
            ValueError: the template cannot write it, or it leaves no room for an answer.
        """
        with self._preparing:  # pictures take memory, and a tokenizer is not made for several threads
            sample = self.processor.prompt(record)
        room = max_tokens if self._room is None else self._room - len(sample.input_ids)
        if room < 1:
            raise ValueError(
                f"The conversation takes {len(sample.input_ids)} positions, and the LLM has {self._room}: there is no "
                "room for an answer. Shorten it, or begin anew."
            )
        return Question(
            sample=sample, max_tokens=min(max_tokens, room), stop=tuple(stop), settings=settings or Settings()
        )

    def answer(
        self,
        questions: Sequence[Question],
        hear: Sequence[Callable[[str], None]] | None = None,
        cancelled: Sequence[Callable[[], bool]] | None = None,
    ) -> list[Answer]:
        """Answers to ``questions``, in one batch, padded on the left.

        ``hear`` gets each one's text while it is written, in pieces that joined are the answer; a question of which
        ``cancelled`` is true is given up at its next token.

        Raises:
            ValueError: the questions have different settings, or are several and sampled: a seed would not give its
                answer again beside others.
        """
        settings = questions[0].settings
        if len({question.settings for question in questions}) > 1 or (settings.sampled and len(questions) > 1):
            raise ValueError(f"{len(questions)} questions in one batch: all must have the same settings, greedy ones.")
        rows = [
            Row(
                self._reader,
                self._ends,
                stop=question.stop,
                most=question.max_tokens,
                hear=hear[place] if hear else _nobody,
                cancelled=cancelled[place] if cancelled else _never,
            )
            for place, question in enumerate(questions)
        ]
        with self._answering:
            self._generate(questions, rows, settings)
        return [
            Answer(row.text, row.finish or "length", len(question.sample.input_ids), row.tokens)
            for row, question in zip(rows, questions, strict=True)
        ]

    def _generate(self, questions: Sequence[Question], rows: list[Row], settings: Settings) -> None:
        batch = self.processor.collate([question.sample for question in questions], PadSide.left)
        changes = {} if settings.injections else without_groups(batch)
        inputs = generation_inputs(batch) | changes
        device = self.model.device
        # top_k=0: transformers would cut the choice to 50 tokens in silence.
        how = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.sampled else {}
        generator: Any = self.model  # transformers types generate() for a protocol that its own models do not meet
        with _drawing(settings, device):
            generator.generate(
                **{name: value.to(device) for name, value in inputs.items()},
                max_new_tokens=max(question.max_tokens for question in questions),
                do_sample=settings.sampled,
                **how,
                synced_gpus=False,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_id=self._ends,
                streamer=Streamer(rows),
                stopping_criteria=StoppingCriteriaList([Ended(rows)]),
            )


@contextmanager
def _drawing(settings: Settings, device: torch.device) -> Iterator[None]:
    """Random numbers of this answer's own; whoever else draws in this process does not notice."""
    if not settings.sampled:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
        yield


def _nobody(text: str) -> None:
    """Hears nothing."""


def _never() -> bool:
    return False
