"""``dry_run=step``: one real step on the worst case, to see whether it fits."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deepstack_pl.batch import MultimodalBatch, Record, Refused, Sample
from deepstack_pl.cli.assemble import Assembly, build_trainer
from deepstack_pl.cli.layout import collate_of, worst_rows
from deepstack_pl.cli.provenance import Memory
from deepstack_pl.cli.report import duration
from deepstack_pl.cli.spread import spread
from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Batching
from deepstack_pl.data.pipeline import PipelineSource
from deepstack_pl.data.sources import Source
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.processes import world
from deepstack_pl.training.interrupt import without_lightnings_handlers
from deepstack_pl.vision.views import full_grid_size

_LOOKED_AT = 256  # samples among which a trial step looks for the longest


def one_step(run: RunConfig, folder: Path, work: Assembly, console: Console, memory: Memory) -> None:
    """A real step on the worst case: a full micro-batch, every row as long as the longest sample and with as many views
    as any, images filling the largest grid. Of ``data.token_budget``, all, with the most views that it holds.
    """
    processor = work.processor
    spread(run, work, lambda receipt: console.print(receipt.table()), console)
    streamed = isinstance(work.train, PipelineSource)  # nothing is known of its samples: those of validation stand in
    samples = _looked_at(work.val if isinstance(work.train, PipelineSource) else work.train, processor)
    unknown = streamed or run.data.batching is Batching.token_budget  # there rows may be as long as the budget leaves
    longest = run.llm.max_length if unknown else max(len(sample.input_ids) for sample in samples)
    batch = collate_of(run, processor)(worst_rows(samples, run, longest, world()))
    once = {"max_steps": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 1}
    trainer = build_trainer(run, folder, [], [], **once, enable_checkpointing=False, enable_progress_bar=False)
    without_lightnings_handlers(trainer)
    start = time.perf_counter()
    trainer.fit(work.module, train_dataloaders=_Once(batch))
    peaks = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in memory.peaks().items())
    console.print(
        f"One step on {len(batch.keys)} samples, {batch.input_ids.numel():,} positions and {len(batch.views)} views: "
        f"{duration(time.perf_counter() - start)}, peak memory: {peaks or 'as before'}. Nothing was saved.",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True, slots=True)
class _Once:
    """A loader of one batch; Lightning would take a plain list for several loaders."""

    batch: MultimodalBatch

    def __iter__(self) -> Iterator[MultimodalBatch]:
        yield self.batch


def _looked_at(source: Source, processor: DeepStackProcessor) -> list[Sample]:
    """The first samples, and those with the most images, the most text, and an image and the least text; their images
    as large as they can be.
    """
    columns = source.columns
    numbers = {*range(min(len(source), _LOOKED_AT)), int(columns.images.argmax()), int(columns.text.argmax())}
    with_image = (columns.images > 0).nonzero()[0]
    if len(with_image):
        numbers.add(int(with_image[columns.text[with_image].argmin()]))  # the most of them share a token budget
    samples: list[Sample] = []
    refused: list[Refused] = []
    for index in sorted(numbers):
        try:
            samples.append(processor.prepare(_largest(source[index], processor)))
        except Refused as error:
            refused.append(error)
    if not samples:
        raise refused[0]
    return samples


def _largest(record: Record, processor: DeepStackProcessor) -> Record:
    size = full_grid_size(processor.plan, processor.vision)
    return replace(record, images=tuple(image.resize(size) for image in record.images))
