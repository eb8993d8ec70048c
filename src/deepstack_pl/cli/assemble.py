"""From a RunConfig to everything that takes part in a run: the only place that sees all rooms."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from transformers.utils import CONFIG_NAME

from deepstack_pl.cli.checks import check_vocabulary
from deepstack_pl.cli.folders import CHECKPOINTS
from deepstack_pl.cli.layout import collate_of, lengths_of
from deepstack_pl.cli.logs import loggers_of, profiler_of
from deepstack_pl.cli.machines import wanted
from deepstack_pl.cli.provenance import digest_of, versions
from deepstack_pl.cli.schedule import settle_steps
from deepstack_pl.config.load import as_text
from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import StreamKind
from deepstack_pl.data.folders import open_folder
from deepstack_pl.data.pipeline import PipelineSource
from deepstack_pl.data.records import Source
from deepstack_pl.data.sources import ShardSource, open_sources
from deepstack_pl.evaluation.benchmark import Benchmark
from deepstack_pl.evaluation.callback import GenerationCallback
from deepstack_pl.inspection.callback import InspectionCallback
from deepstack_pl.language.config import LLMConfig, LLMInit, Size
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.build import build_model, checkpoint_config
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.multimodal.start import load_weights
from deepstack_pl.processes import in_turn, rank
from deepstack_pl.training.counts import DataCounts
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.guard import FirstStepGuard
from deepstack_pl.training.interrupt import GracefulStop
from deepstack_pl.training.ledger import Ledger
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.parts import adapters_of, part_configs
from deepstack_pl.training.sharding import shares_weights
from deepstack_pl.training.split import StepSplit
from deepstack_pl.training.strategies import make_strategy
from deepstack_pl.training.throughput import Throughput
from deepstack_pl.training.watchdog import Watchdog
from deepstack_pl.vision.config import VisionInit

SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class Assembly:
    """One run, ready to start."""

    processor: DeepStackProcessor
    train: Source | PipelineSource
    val: Source
    module: DeepStackModule
    datamodule: DeepStackDataModule
    trainer: lightning.Trainer
    generation: GenerationCallback
    inspection: InspectionCallback
    stop: GracefulStop

    @property
    def throughput(self) -> Throughput | None:
        """What measures speed; None where conf leaves it out."""
        return next((c for c in self._callbacks if isinstance(c, Throughput)), None)

    @property
    def speed(self) -> dict[str, float]:
        """The numbers of the newest window, and of the newest step that was taken apart, by their logged names."""
        split = next((c.last for c in self._callbacks if isinstance(c, StepSplit)), {})
        window = {} if self.throughput is None else self.throughput.last
        return window | {f"split/{part}": seconds for part, seconds in split.items()}

    @property
    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it in a connector


def settle(run: RunConfig) -> list[str]:
    """Settle in ``run`` what follows from its other values; a note for each change, and for what looks like a slip."""
    adapted = adapters_of(run.stage)
    notes = [
        f"{part}: frozen, although its weights are random and nothing comes before them. Give init_from=RUN, or say "
        f"stage.{part}.trained=true{' and no lora' if part in adapted else ''}."
        for part in _drawn(run)
        if (not part_configs(run.stage)[part].trained or part in adapted) and not run.init_from
    ]
    written, built = run.llm.architecture, run.llm.built
    if run.llm.size is Size.tiny:
        changed = ", ".join(f"{key} {value}" for key, value in built.items() if value != written.get(key))
        notes.append(f"llm.size=tiny: of {run.llm.name} its twin is built, with {changed}.")
    if run.llm.checkpoint and tokenizer_of(run.llm) is None and run.llm.template != SHIPPED:
        notes.append(
            f"llm.init=random: text is written with the shipped tokenizer and template, not with {run.llm.template}, "
            f"whose tokens come with the weights of {run.llm.checkpoint}."
        )
        run.llm.template = SHIPPED
    return notes


def tokenizer_of(llm: LLMConfig) -> str | None:
    """Where the LLM's own tokenizer lies: with its weights, or, where these are random, in a local folder that is
    ``llm.checkpoint``. None means the shipped one, whose vocabulary every tiny twin has.
    """
    if llm.init is LLMInit.pretrained:
        return llm.checkpoint
    files = [Path(llm.checkpoint) / name for name in ("tokenizer.json", "tokenizer.model")] if llm.checkpoint else []
    return llm.checkpoint if llm.size is Size.full and any(file.is_file() for file in files) else None


def _drawn(run: RunConfig) -> list[str]:
    """The parts whose weights are drawn at random; the projector's always are."""
    drawn = {"vision": run.vision.init is VisionInit.random, "projector": True, "llm": run.llm.init is LLMInit.random}
    return [part for part, random in drawn.items() if random]


def origin(run: RunConfig, folder: Path | None = None) -> str | None:
    """The folder that all weights of ``run`` come from, with configuration and tokenizer: where it started, or, for one
    that goes on in ``folder``, that folder itself. None where each part has its own source.
    """
    if run.init_from and folder is not None and (folder / CONFIG_NAME).is_file():
        return str(folder)
    return run.init_from


def model_builder(
    run: RunConfig, image_token_id: int, *, fresh: bool = True, start: str | None = None
) -> Callable[..., Any]:
    """A function that builds the model of ``run``, with ``init_from``'s weights unless a checkpoint follows."""

    def build(device: str = "cpu") -> DeepStackForConditionalGeneration:
        model = build_model(
            run.model,
            run.llm,
            run.vision,
            run.projector,
            seed=run.seed,
            image_token_id=image_token_id,
            device=device,
            start=start or run.init_from,
            lora=adapters_of(run.stage),
        )
        if run.init_from and fresh and device != "meta":
            drawn = load_weights(model, run.init_from)
            if drawn:
                print(f"init_from={run.init_from} has no {', '.join(drawn)}: drawn anew.")
        return model

    return build


def make_processor(run: RunConfig, start: str | None = None) -> DeepStackProcessor:
    """The processor of ``run``: with the tokenizer of the folder ``start`` that all weights come from, else with the
    LLM's own (`tokenizer_of`), else with the shipped one.
    """
    start = start or run.init_from
    if run.llm.init is LLMInit.pretrained:
        checkpoint_config(run.llm, start)  # its error says more than a missing tokenizer's would
    return DeepStackProcessor(
        load_tokenizer(start or tokenizer_of(run.llm)),
        plan=build_plan(run.model, run.llm, run.vision),
        vision=run.vision,
        template=run.llm.template,
        max_length=run.llm.max_length,
        too_long=run.llm.too_long,
        backend=run.data.views.backend,
    )


def assemble(run: RunConfig, folder: Path, *, fresh: bool = True) -> Assembly:
    """Everything for the run in ``folder``; ``fresh`` unless a checkpoint is to be loaded.

    Raises:
        ValueError: data, weights or a tokenizer are not at hand, or the Trainer does not take what it is given.
    """
    loggers, start = loggers_of(run, folder), origin(run, None if fresh else folder)
    with in_turn():
        processor = make_processor(run, start)
        check_vocabulary(run, processor)
        benchmarks = [Benchmark.open(name, task) for name, task in run.evaluation.tasks.items()]
        train, val = open_data(run)  # after what is quick to refuse: it may write a whole set
        lengths = lengths_of(train, processor, run)
    steps = settle_steps(run, train, lengths)
    build = model_builder(run, processor.image_token_id, fresh=fresh, start=start)
    if shares_weights(run.strategy) and rank():
        build = partial(build, device="meta")  # process 0 hands the weights out
    module = DeepStackModule(build, run.stage, run.optim, steps)
    with in_turn():
        module.configure_model()
    generation, stop = GenerationCallback(val, processor, run.evaluation, benchmarks=benchmarks), GracefulStop()
    inspection = InspectionCallback(processor, generation, config=as_text(run))
    guards = [FirstStepGuard(), stop, Watchdog(folder, run.strategy)]
    callbacks = [*machines(run, folder), *guards, generation, inspection, DataCounts()]
    return Assembly(
        processor=processor,
        train=train,
        val=val,
        module=module,
        datamodule=DeepStackDataModule(
            train,
            val,
            processor,
            run.data,
            run.seed,
            steps,
            lengths=lengths,
            ledger=Ledger(folder),
            collate=collate_of(run, processor),
        ),
        trainer=build_trainer(run, folder, callbacks, loggers),
        generation=generation,
        inspection=inspection,
        stop=stop,
    )


def open_data(run: RunConfig) -> tuple[Source | PipelineSource, Source]:
    """What is trained on, and what is validated with, which always lies behind an index."""
    if run.data.stream is StreamKind.webdataset:
        return PipelineSource(run.data), ShardSource(open_folder(run.data.root, "val", run.data))
    return open_sources(run.data)


def machines(run: RunConfig, folder: Path) -> list[Callback]:
    """The callbacks of conf, with what only the run knows: where checkpoints lie, what is computed in."""
    facts = {"config": digest_of(run), "versions": versions()}
    precision = str(run.trainer.get("precision") or "32-true")
    where = {
        "checkpoint": {"folder": str(folder / CHECKPOINTS), "facts": facts},
        "throughput": {"precision": precision},
    }
    chosen = [(name, values) for name, values in run.callbacks.items() if values]
    return [instantiate({**values, "_convert_": "all"}, **where.get(name, {})) for name, values in chosen]


def device_of(run: RunConfig) -> torch.device:
    """This process's device; whether it is there the Trainer finds out."""
    accelerator = str(run.trainer.get("accelerator", "auto"))
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator not in ("gpu", "cuda"):
        return torch.device(accelerator)
    named = run.trainer.get("devices")
    if "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", named[0] if isinstance(named, list | tuple) else 0)


def build_trainer(
    run: RunConfig, folder: Path, callbacks: list[Callback], loggers: list[Logger], **more: Any
) -> lightning.Trainer:
    """conf's Trainer, over conf's machines. What an epoch is, and the samples' order, are not its affair.

    Raises:
        ValueError: an argument that it does not take, or a machine that is not there.
    """
    make = instantiate({**run.trainer, "_partial_": True})
    assert isinstance(make, partial)
    there = wanted(run)
    device = device_of(run)
    set_by_us = {
        "strategy": make_strategy(run.strategy, device, there.world),
        "devices": (make.keywords.get("devices") or 1) if there.world == 1 else there.devices,
        "num_nodes": there.nodes,
        "plugins": [LightningEnvironment()],  # SLURM's would answer signals in a way of its own
        "accumulate_grad_batches": run.data.accumulation(there.world),
        "profiler": profiler_of(make.keywords.get("profiler"), folder),
    }
    if shares_weights(run.strategy):
        set_by_us["precision"] = "32-true"  # `shard` has seen to it
    ours = {
        "callbacks": callbacks,
        "logger": loggers or False,
        "default_root_dir": str(folder),
        "gradient_clip_val": run.optim.clip_norm or None,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(run.callbacks.get("checkpoint")),
        "enable_progress_bar": bool(run.callbacks.get("progress")),
    }
    try:
        return make(**{**ours, **make.keywords, **set_by_us, **more})
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error} Check trainer= and strategy=.") from error
