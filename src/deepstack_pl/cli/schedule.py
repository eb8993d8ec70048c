"""How long a run is, where ``data.epochs`` says it: in steps, once the data are open."""

from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Batching, Source
from deepstack_pl.data.pipeline import PipelineSource
from deepstack_pl.data.records import Source as Records
from deepstack_pl.data.stream import Stream


def settle_steps(run: RunConfig, train: Records | PipelineSource, lengths: Int[ndarray, " n"] | None) -> int:
    """The optimiser steps of ``run``; written into it, in place of ``data.epochs``, so that it stays this long whatever
    becomes of the data.
    """
    if run.data.epochs is not None:
        assert not isinstance(train, PipelineSource), "the config's check refuses it"
        stream = Stream(train, run.data, run.seed, lengths=lengths, capacity=run.llm.max_length)
        run.trainer["max_steps"], run.data.epochs = stream.steps(run.data.epochs), None
    return run.trainer["max_steps"]


def expected_samples(run: RunConfig) -> int | None:
    """How many samples are trained on, as far as it is known before the data are open."""
    data = run.data
    if data.source is Source.fine_print:
        return data.fine_print.train_pages
    if data.source is Source.corpus and data.expected.records is not None:
        return data.expected.records - data.val_samples
    return None


def expected_length(run: RunConfig) -> str:
    """One sentence on the length of ``run``, before the data are open."""
    data, samples = run.data, expected_samples(run)
    counted = samples is not None and data.batching in (Batching.samples, Batching.modality_length)
    steps = run.trainer["max_steps"]
    if not counted or samples is None:
        given = f"data.epochs={data.epochs:g}; how many steps" if steps is None else f"{steps:,} steps; how many epochs"
        return f"{given} that is, the data say once they are open."
    each = samples / data.batch_size
    steps = steps or max(1, int(each * (data.epochs or 1)))
    epochs = f"{steps / each:.3g}"
    return f"{steps:,} steps of {data.batch_size}, {epochs} epoch{'' if epochs == '1' else 's'} of {samples:,} samples."
