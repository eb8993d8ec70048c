"""Evaluation by generation: greedy answers, scored fact by fact. Works wherever the model is."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from deepstack_pl.language import ends
from deepstack_pl.language.conversation import encode, encode_prompt
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor, generation_inputs
from deepstack_pl.processes import from_all, rank, whole, world


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
    """What an evaluation found: numbers by kind, every sample behind them, and why others are not."""

    metrics: dict[str, dict[str, Any]]
    records: tuple[SampleResult, ...]
    not_asked: tuple[str, ...] = ()


def evaluate(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    source: Source,
    config: EvaluationConfig,
    samples: int,
    progress: Progress | None = None,
    *,
    injections: bool = True,
) -> Results:
    """Answer the first ``samples`` samples of ``source`` and score them, but for those that cannot be asked. Uses no
    random numbers; leaves modes alone. Processes share the batches, and all get all results.

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
    stops = stop_ids(processor)
    records: list[SampleResult] = []
    left: list[str] = []
    for batch in answers(
        model,
        processor,
        source.__getitem__,
        range(count),
        refuse=lambda record: not_asked(processor, record, config, stops),
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        injections=injections,
    ):
        records += [_result(each.index, each.record, each.text) for each in batch if each.not_asked is None]
        left += [each.not_asked for each in batch if each.not_asked is not None]
        if progress and task is not None:
            progress.advance(task, len(batch))
    records = sorted((r for each in from_all(records) for r in each), key=lambda record: record.index)
    left = [why for each in from_all(left) for why in each]
    if not records:
        raise ValueError(f"nothing to evaluate: none of {count} samples can be asked; {left[0]}")
    # Every process has all records: were they to be added up, each would count as often as there are processes.
    metric = FactAccuracy(sorted({record.kind for record in records}), config.confidence, sync_on_compute=False)
    for record in records:
        metric.update(record.kind, record.correct, record.exact)
    return Results(metric.compute(), tuple(records), tuple(left))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question; ``not_asked`` says why nothing did."""

    index: int
    record: Record
    text: str
    not_asked: str | None


def answers(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    read: Callable[[int], Record],
    indices: Sequence[int],
    *,
    refuse: Callable[[Record], str | None],
    batch_size: int,
    max_new_tokens: int,
    injections: bool = True,
) -> Iterator[list[Answer]]:
    """Greedy answers to this process's share of the questions, batch by batch; while one is answered, the next is read.

    Leaves the modes of ``model`` alone. All processes must call it, and go through all that it gives.
    """
    batches = [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)][rank() :: world()]

    def prepare(batch: Sequence[int]) -> list[tuple[int, Record, str | None]]:
        records = [(index, read(index)) for index in batch]
        return [(index, record, refuse(record)) for index, record in records]

    with whole(model), evaluating(model), ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(prepare, batch) for batch in batches[:1]]
        for place in range(len(batches)):
            ready = coming.pop().result()
            coming = [reader.submit(prepare, batch) for batch in batches[place + 1 : place + 2]]
            asked = [record for _, record, why in ready if why is None]
            said = iter(generate(model, processor, asked, max_new_tokens, injections=injections) if asked else [])
            yield [Answer(index, record, next(said) if why is None else "", why) for index, record, why in ready]


def generate(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    records: list[Record],
    max_new_tokens: int,
    *,
    injections: bool = True,
    **options: Any,
) -> list[str]:
    """Answers to ``records``, in one batch; the answers they hold are not shown to the model. Greedy, unless
    transformers' own ``options`` of generation say otherwise. Without ``injections`` the model sees what stands in the
    text alone.
    """
    batch = processor.collate([processor.prompt(record) for record in records], PadSide.left).to(model.device)
    inputs = generation_inputs(batch)
    if not injections:
        inputs |= {name: torch.full_like(inputs[name], -1) for name in ("group_rows", "vit_rows")}
    generator: Any = model  # transformers types generate() for a protocol that its own models do not meet
    ids = generator.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        **{"do_sample": False, **options},
        synced_gpus=False,  # processes answer different questions, each with the whole model
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=stop_ids(processor),
    )
    return [text.strip() for text in processor.decode(ids[:, batch.input_ids.shape[1] :])]


def stop_ids(processor: DeepStackProcessor) -> list[int]:
    """Tokens that end an answer."""
    return ends.stop_ids(processor.tokenizer, processor.template)


def not_asked(processor: DeepStackProcessor, record: Record, config: EvaluationConfig, stops: list[int]) -> str | None:
    """Why ``record`` cannot be asked: its question is longer than the context, or the limit would cut a right answer
    short, and so score it wrong. None where it can.
    """
    _answer(record)
    too_long = no_room(processor, record)
    if too_long is not None:
        return too_long
    length = _answer_length(processor, record, stops)
    if length > config.max_new_tokens:
        return (
            f"sample {record.key!r}: its answer and its end are {length} tokens, but evaluation.max_new_tokens="
            f"{config.max_new_tokens}: a right answer would be cut short and scored as wrong. Set "
            f"evaluation.max_new_tokens={length} or more to ask it."
        )
    return None


def no_room(processor: DeepStackProcessor, record: Record) -> str | None:
    """Why the question of ``record`` is too long to be asked; None where it is not."""
    turns = record.turns[:-1] if record.turns[-1].role is Role.assistant else record.turns
    ids = encode_prompt(turns, processor.template, processor.tokenizer)
    most = processor.plan.context_tokens(processor.tokens_per_view)
    if len(ids) + len(record.images) * (most - 1) > processor.max_length:
        try:
            processor.prompt(record)  # the others cost nothing but their ids
        except ValueError as error:
            return str(error)
    return None


def require_room(processor: DeepStackProcessor, source: Source, config: EvaluationConfig) -> list[str]:
    """Look at all samples that will be asked for, before a step is made; one sentence for each that cannot be asked.

    Raises:
        ValueError: no sample of a kind can be asked: its accuracy would be missing. Or one cannot be read.
    """
    count = min(max(config.samples, config.final_samples), len(source))
    stops, asked, left = stop_ids(processor), Counter(), {}
    for index in range(count):
        record = source[index]
        why = not_asked(processor, record, config, stops)
        asked[record.kind] += why is None
        if why is not None:
            left[record.key] = (record.kind, why)
    for kind, why in left.values():
        if not asked[kind]:
            raise ValueError(f"none of the samples of kind {kind!r} can be asked; {why}")
    return [why for _, why in left.values()]


def _answer_length(processor: DeepStackProcessor, record: Record, stops: list[int]) -> int:
    """Tokens that generating the answer of ``record`` takes, the one that ends it included."""
    whole = encode(record.turns, processor.template, processor.tokenizer).input_ids
    ids = whole[len(encode_prompt(record.turns[:-1], processor.template, processor.tokenizer)) :]
    return next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))


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


def _answer(record: Record) -> str:
    if record.turns[-1].role is not Role.assistant:
        raise ValueError(
            f"sample {record.key!r} ends without an answer: there is nothing to compare a prediction with."
        )
    return record.turns[-1].text.strip()


def _result(index: int, record: Record, prediction: str) -> SampleResult:
    answer = _answer(record)
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
