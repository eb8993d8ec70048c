"""How the samples of a run lie in its batches: how long they are, what shares a row, and the largest batch there is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.batch import MultimodalBatch, Sample
from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.lengths import measure_lengths
from deepstack_pl.data.packing import in_one_row
from deepstack_pl.data.pipeline import PipelineSource
from deepstack_pl.data.records import Outline, Source
from deepstack_pl.language.varlen import BY_BOUNDARIES
from deepstack_pl.multimodal.processor import DeepStackProcessor

Rows = Sequence[Sample | Sequence[Sample]]


def collate_of(run: RunConfig, processor: DeepStackProcessor) -> Callable[[Rows], MultimodalBatch]:
    """What makes batches of training samples: rows that are padded, or, where attention is told where samples begin,
    all of a micro-batch in a single row.
    """
    return partial(in_one_row, processor.collate) if run.llm.attention in BY_BOUNDARIES else processor.collate


def rows_are_shared(run: RunConfig) -> bool:
    """Whether a row may hold several samples, which must not see each other."""
    return run.llm.attention in BY_BOUNDARIES or run.data.batching is Batching.packed


def lengths_of(
    train: Source | PipelineSource, processor: DeepStackProcessor, run: RunConfig
) -> Int[ndarray, " n"] | None:
    """The positions of each sample, measured once and kept, where batches are planned with them."""
    if isinstance(train, PipelineSource) or run.data.batching in (Batching.samples, Batching.modality_length):
        return None
    return measure_lengths(
        train,
        partial(positions_of, processor),
        processor.positions_digest,
        Path(run.data.cache),
        max(1, run.data.workers),
    )


def positions_of(processor: DeepStackProcessor, outline: Outline) -> int:
    """The positions of one sample before it is cut; for `measure_lengths`, whose processes import it by name."""
    return processor.positions(outline.turns, outline.sizes)


def worst_rows(samples: Sequence[Sample], run: RunConfig, longest: int, processes: int = 1) -> list[list[Sample]]:
    """The rows of one forward of one of ``processes`` that bring the most views: of the sample of which most fit,
    lengthened to ``longest`` positions, to what ``data.token_budget`` leaves it, or to fill a packed row.
    """
    config, capacity = run.data, run.llm.max_length
    most = max(samples, key=lambda s: (len(s.views) * together(config, len(s.input_ids), capacity), -len(s.input_ids)))
    length = len(most.input_ids)
    rows = config.micro_batch(processes)
    if config.batching is Batching.packed:
        fit = max(1, capacity // length)
        return [[*[most] * (fit - 1), lengthened(most, capacity - (fit - 1) * length)]] * rows
    if config.batching is Batching.token_budget:
        rows *= max(1, config.token_budget // length)
        longest = min(longest, config.token_budget // together(config, length, capacity))
    return [[lengthened(most, longest)]] * rows


def together(config: DataConfig, length: int, capacity: int) -> int:
    """Samples of ``length`` positions in a unit: a sample, a micro-batch, or a row of ``capacity`` positions."""
    match config.batching:
        case Batching.token_budget:
            return max(1, config.token_budget // length)
        case Batching.packed:
            return max(1, capacity // length)
        case _:
            return 1


def lengthened(sample: Sample, longest: int) -> Sample:
    """The same with its last token again and again, up to ``longest`` positions."""
    missing = longest - len(sample.input_ids)
    if missing <= 0:
        return sample
    ids, labels, index = (
        torch.cat([tensor, last.expand(missing)])
        for tensor, last in (
            (sample.input_ids, sample.input_ids[-1:]),
            (sample.labels, sample.labels[-1:]),
            (sample.token_index, torch.tensor([-1])),
        )
    )
    return replace(sample, input_ids=ids, labels=labels, token_index=index)
