"""Validation during training: by generation, as the last evaluation will be."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from deepstack_pl.batch import Record
from deepstack_pl.data.sources import Source
from deepstack_pl.evaluation.answer_metric import ALL
from deepstack_pl.evaluation.asking import ask
from deepstack_pl.evaluation.benchmark import Benchmark
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.evaluation.runner import Results, SampleResult, evaluate, require_room
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor


class Trained(Protocol):
    """A LightningModule of ours: rooms on one floor do not see each other."""

    @property
    def network(self) -> DeepStackForConditionalGeneration: ...


class GenerationCallback(lightning.Callback):
    """Evaluates ``source``, and the first questions of ``benchmarks``, every ``config.every_steps`` optimiser steps (0:
    never) and logs what was found by kind.

    Attributes:
        last_step: the step of the newest validation; -1 before the first.
        last_results: what it found.
        history: each validation's step and, by kind or benchmark, its accuracy: a learning curve.
        not_asked: of the samples that evaluation looks at, why some cannot be asked.
        pages: a few of its samples, of every kind, for pictures: what was asked, and what came.
    """

    def __init__(
        self,
        source: Source,
        processor: DeepStackProcessor,
        config: EvaluationConfig,
        *,
        benchmarks: Sequence[Benchmark] = (),
        pages_per_kind: int = 2,
    ) -> None:
        if config.every_steps < 0:
            raise ValueError(f"evaluation.every_steps={config.every_steps}: use 0 for never, or 1 and more.")
        self.source = source
        self.processor = processor
        self.config = config
        self.benchmarks = benchmarks
        self.pages_per_kind = pages_per_kind
        self.last_step = -1
        self.last_results: Results | None = None
        self.history: list[dict[str, float]] = []
        self.not_asked: list[str] = []
        self.pages: list[tuple[Record, SampleResult]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before step 0, and not after hours of training.

        Raises:
            ValueError: no sample of a kind can be asked, or one cannot be read.
        """
        self.not_asked = require_room(self.processor, self.source, self.config)
        if self.not_asked:
            rank_zero_warn(f"{len(self.not_asked)} samples will not be asked in evaluation. {self.not_asked[0]}")
        for benchmark in self.benchmarks:
            for index in range(min(self.config.samples, len(benchmark))):
                benchmark.record(index)  # one that cannot be read would end the run at its first validation

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if not self.config.every_steps or step % self.config.every_steps or step in (0, self.last_step):
            return
        self.last_step = step
        results = evaluate(network_of(pl_module), self.processor, self.source, self.config, self.config.samples)
        self.keep(results)
        accuracy = {kind: values["accuracy"] for kind, values in results.metrics.items()}
        log_results(trainer.loggers, results, step)
        for benchmark in self.benchmarks:
            network = network_of(pl_module)
            lines = ask(network, self.processor, benchmark, self.config, first=self.config.samples)
            metrics = benchmark.metrics(lines, self.config.confidence)
            log_benchmark(trainer.loggers, benchmark.name, metrics, step)
            accuracy[benchmark.name] = next(iter(metrics[ALL].values()))
            self.pages += [benchmark.page(line) for line in lines[: self.pages_per_kind]]
        self.history.append({"step": step, **accuracy})
        for kind, value in accuracy.items():
            pl_module.log(kind, value, prog_bar=True, logger=False, batch_size=1)

    def keep(self, results: Results) -> None:
        """Remember ``results`` and the first samples of each kind."""
        self.last_results = results
        chosen = [
            record
            for kind in results.metrics
            for record in [r for r in results.records if r.kind == kind][: self.pages_per_kind]
        ]
        self.pages = [(self.source[record.index], record) for record in chosen]


def log_results(loggers: Iterable[Logger], results: Results, step: int, prefix: str = "val") -> list[str]:
    """``<prefix>/<kind>/accuracy`` and ``.../exact_match`` to every logger; the names."""
    values = {
        f"{prefix}/{kind}/{name}": found[name]
        for kind, found in results.metrics.items()
        for name in ("accuracy", "exact_match")
    }
    for logger in loggers:
        logger.log_metrics(values, step=step)
    return list(values)


def log_benchmark(
    loggers: Iterable[Logger], name: str, metrics: Mapping[str, Mapping[str, Any]], step: int, prefix: str = "val"
) -> list[str]:
    """``<prefix>/<benchmark>/<kind>/<metric>`` to every logger; the names."""
    values = {
        f"{prefix}/{name}/{kind}/{metric}": value
        for kind, found in metrics.items()
        for metric, value in found.items()
        if isinstance(value, float)
    }
    for logger in loggers:
        logger.log_metrics(values, step=step)
    return list(values)


def network_of(module: Any) -> DeepStackForConditionalGeneration:
    """The model inside a LightningModule of ours."""
    trained: Trained = module
    return trained.network
