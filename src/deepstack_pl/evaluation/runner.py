"""Evaluation by generation: greedy answers, scored fact by fact. Works wherever the model is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from deepstack_pl.batch import PadSide, Record, Role
from deepstack_pl.data.sources import Source
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.evaluation.metrics import FactAccuracy, score
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor, generation_inputs


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One answer, scored.

    Attributes:
        index: its place in the source.
        correct: for each of ``facts``, whether the prediction states it.
        exact: the whole answer, but for space around it, is right.
    """

    index: int
    key: str
    kind: str
    prompt: str
    prediction: str
    answer: str
    facts: tuple[str, ...]
    correct: tuple[bool, ...]
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "facts": list(self.facts), "correct": list(self.correct)}


@dataclass(frozen=True, slots=True)
class Results:
    """What an evaluation found: numbers by kind, and every sample behind them."""

    metrics: dict[str, dict[str, Any]]
    records: tuple[SampleResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "records": [record.to_dict() for record in self.records]}


def evaluate(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    source: Source,
    config: EvaluationConfig,
    samples: int,
    progress: Progress | None = None,
) -> Results:
    """Answer the first ``samples`` samples of ``source`` and score them. Uses no random numbers; leaves modes alone.

    Raises:
        ValueError: there is nothing to evaluate, or a sample has no answer to compare with.
    """
    count = min(samples, len(source))
    if count < 1 or config.batch_size < 1:
        raise ValueError(
            f"nothing to evaluate: {samples} samples were asked for in batches of {config.batch_size}, and the source "
            f"holds {len(source)}. Both numbers and the source's length must be at least 1."
        )
    task = progress.add_task("evaluating", total=count) if progress else None
    records: list[SampleResult] = []
    with evaluating(model):
        for start in range(0, count, config.batch_size):
            indices = range(start, min(start + config.batch_size, count))
            batch = [source[index] for index in indices]
            predictions = generate(model, processor, batch, config.max_new_tokens)
            records += [_result(*each) for each in zip(indices, batch, predictions, strict=True)]
            if progress and task is not None:
                progress.advance(task, len(indices))
    metric = FactAccuracy(sorted({record.kind for record in records}), config.confidence)
    for record in records:
        metric.update(record.kind, record.correct, record.exact)
    return Results(metric.compute(), tuple(records))


def generate(
    model: DeepStackForConditionalGeneration, processor: DeepStackProcessor, records: list[Record], max_new_tokens: int
) -> list[str]:
    """Greedy answers to ``records``, in one batch; the answers they hold are not shown to the model."""
    batch = processor.collate([processor.prompt(record) for record in records], PadSide.left).to(model.device)
    generator: Any = model  # transformers types generate() for a protocol that its own models do not meet
    ids = generator.generate(
        **generation_inputs(batch),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=stop_ids(processor),
    )
    return [text.strip() for text in processor.decode(ids[:, batch.input_ids.shape[1] :])]


def stop_ids(processor: DeepStackProcessor) -> list[int]:
    """Tokens that end an answer: the tokenizer's own end, and the template's, which may be another one."""
    end = processor.tokenizer.convert_tokens_to_ids(processor.template.assistant_suffix.strip())
    known = isinstance(end, int) and end != processor.tokenizer.unk_token_id
    return sorted({i for i in (processor.tokenizer.eos_token_id, end if known else None) if isinstance(i, int)})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: tensors that a model keeps would be useless to later training
            yield
    finally:
        for module, training in modes:
            module.training = training


def _result(index: int, record: Record, prediction: str) -> SampleResult:
    if record.turns[-1].role is not Role.assistant:
        raise ValueError(
            f"sample {record.key!r} ends without an answer: there is nothing to compare a prediction with."
        )
    answer = record.turns[-1].text.strip()
    facts = record.facts or (answer,)
    return SampleResult(
        index=index,
        key=record.key,
        kind=record.kind,
        prompt="\n".join(turn.text for turn in record.turns[:-1]),
        prediction=prediction,
        answer=answer,
        facts=facts,
        correct=tuple(score(prediction, facts)),
        exact=prediction == answer,
    )
