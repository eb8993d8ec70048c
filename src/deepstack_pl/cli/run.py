"""One run, from a RunConfig to a report: plan, receipt, training, weights, evaluation."""

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from deepstack_pl.batch import MultimodalBatch, Record
from deepstack_pl.cli import provenance
from deepstack_pl.cli.assemble import Assembly, assemble, build_trainer, model_builder, settle
from deepstack_pl.cli.folders import CONFIG, RECEIPT, claim, relative, remember, write_text
from deepstack_pl.cli.report import duration, print_report, write_results
from deepstack_pl.cli.resume import Resumed
from deepstack_pl.config.load import save
from deepstack_pl.config.run import DryRun, RunConfig
from deepstack_pl.data.sources import Source
from deepstack_pl.evaluation.callback import log_results
from deepstack_pl.evaluation.runner import evaluate
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.training.parts import apply_stage
from deepstack_pl.vision.views import full_grid_size

_KNOWN = (  # Lightning's advice that does not apply here
    ".*does not have many workers.*",
    ".*`val_dataloader`.*",
    ".*isinstance.*LeafSpec.*",
    ".*smaller than the logging interval.*",
)
_LOOKED_AT = 256  # samples among which a trial step looks for the longest


def execute(
    run: RunConfig, folder: Path, command: str, *, arm: Sequence[str] = (), resumed: Resumed | None = None
) -> bool:
    """Run ``run`` in ``folder``, or try it as ``dry_run`` says; whether Ctrl-C ended it. ``command`` is for the record.

    Raises:
        ValueError: something that the user can mend.
    """
    console = Console()
    _be_quiet()
    _share_cores(run)
    notes = settle(run)
    console.print(build_plan(run.model, run.llm, run.vision).draw() + "\n", markup=False, highlight=False)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    if run.trial is DryRun.true:
        model = model_builder(run, image_token_id=0)(device="meta")
        console.print(apply_stage(model, run.stage).table())
        return False
    work = assemble(run, folder, fresh=resumed is None)
    assert work.module.parts is not None
    console.print(work.module.parts.table())
    if run.trial is DryRun.step:
        _one_step(run, folder, work, console)
        return False
    return _Run(run, folder, work, console, command, list(arm), resumed).whole()


@dataclass
class _Run:
    """The stretch between an assembled run and its report; ``results`` is on disk from the first moment on."""

    run: RunConfig
    folder: Path
    work: Assembly
    console: Console
    command: str
    arm: list[str]
    resumed: Resumed | None

    def whole(self) -> bool:
        self.results = self._begin()
        try:
            self._receipt()
            self._fit()
            self._evaluate()
        except BaseException as error:
            self.results |= {"status": "failed", "reason": f"{type(error).__name__}: {error}", "steps": self._step}
            write_results(self.folder, self.results)
            self._say_how_to_go_on(error)
            raise
        print_report(self.console, self.results, self.folder)
        return self.results["interrupted"]

    @property
    def _step(self) -> int:
        return self.work.trainer.global_step

    def _begin(self) -> dict[str, Any]:
        if self.resumed is None:
            claim(self.folder)
            started = describe(self.run, self.work)
        else:
            started = self.resumed.results or describe(self.run, self.work)
            step = started.get("steps", 0)
            self.console.print(
                f"going on with {relative(self.folder)} from {relative(self.resumed.checkpoint)} (step {step})",
                soft_wrap=True,
            )
        started |= {"status": "running", "interrupted": False, "max_steps": self.run.trainer["max_steps"]}
        started["commands"] = [*started.get("commands", []), self.command]
        started.setdefault("arm", self.arm)
        started.pop("reason", None)
        save(self.run, self.folder / CONFIG)
        write_results(self.folder, started)
        remember(self.folder)
        return started

    def _receipt(self) -> None:
        """Taken here, so that it is on disk and on the terminal before anything can fail on it."""
        self.work.module.to(self.work.trainer.strategy.root_device)
        receipt = take_receipt(self.work.module.network, self.work.processor)
        self.work.inspection.receipt = receipt
        write_text(self.folder / RECEIPT, json.dumps(receipt.to_dict(), indent=2) + "\n")
        self.results["receipt"] = {"ok": receipt.ok, "injections": len(receipt.rows)}
        self.console.print(receipt.table())
        receipt.require()

    def _fit(self) -> None:
        start = time.perf_counter()
        checkpoint = str(self.resumed.checkpoint) if self.resumed else None
        try:
            self.work.trainer.fit(
                self.work.module, datamodule=self.work.datamodule, ckpt_path=checkpoint, weights_only=True
            )
        finally:
            self.results["seconds"]["train"] += time.perf_counter() - start
        speed = self.work.throughput.get("speed/tokens_per_second")
        self.results |= {"steps": self._step, "tokens_per_second": speed, "interrupted": self.work.stop.interrupted}
        network = self.work.module.network
        (self.folder / "hparams.yaml").unlink(missing_ok=True)  # the TensorBoard logger's; config.yaml says it all
        network.save_pretrained(self.folder)
        self.work.processor.save_pretrained(self.folder)

    def _evaluate(self) -> None:
        start, config = time.perf_counter(), self.run.evaluation
        network = self.work.module.to(self.work.trainer.strategy.root_device).network
        with _bar(self.console) as progress:
            found = evaluate(network, self.work.processor, self.work.val, config, config.final_samples, progress)
        log_results(self.work.trainer.loggers, found, self._step, prefix="final")
        lines = [json.dumps(record.to_dict(), ensure_ascii=False) for record in found.records]
        write_text(self.folder / "predictions.jsonl", "\n".join(lines) + "\n")
        self.results["seconds"]["evaluate"] += time.perf_counter() - start
        status = "interrupted" if self.results["interrupted"] else "finished"
        memory = provenance.peak_memory()
        self.results |= {"status": status, "metrics": found.metrics, "peak_memory_bytes": memory}
        write_results(self.folder, self.results)

    def _say_how_to_go_on(self, error: BaseException) -> None:
        saved = sorted((self.folder / "checkpoints").glob("*.ckpt"))
        if saved:
            self.console.print(
                f"Stopped by {type(error).__name__} at step {self._step}. Saved: {', '.join(map(relative, saved))}\n"
                f"To go on: python train.py ckpt_path={relative(self.folder)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def describe(run: RunConfig, work: Assembly) -> dict[str, Any]:
    """What is known of a run before its first step."""
    plan, per_view, parts = work.processor.plan, work.processor.tokens_per_view, work.module.parts
    assert parts is not None
    return {
        "status": "running",
        "metrics": {},
        "plan": {"name": plan.name, "digest": plan.digest, "injections": [str(i) for i in plan.injections]},
        "tokens_per_image": {"seen": plan.seen_tokens(per_view), "context": plan.context_tokens(per_view)},
        "parameters": {"total": parts.parameters, "trained": parts.trained, "by_part": parts.to_dict()["parts"]},
        "steps": 0,
        "seconds": {"train": 0.0, "evaluate": 0.0},
        "tokens_per_second": None,
        "seed": run.seed,
        "data": provenance.data_of(work.train, work.val, run),
        **provenance.weight_digests(work.module.network),
        "device": provenance.device_name(work.trainer.strategy.root_device),
        "versions": provenance.versions(),
        "git": provenance.git(),
    }


def _one_step(run: RunConfig, folder: Path, work: Assembly, console: Console) -> None:
    """A real step on the worst case: a full batch of the longest sample, its images filling the largest grid."""
    processor = work.processor
    take_receipt(work.module.network, processor).require()
    sample = max(
        (processor.prepare(_largest(record, processor)) for record in _first(work.train)),
        key=lambda s: len(s.input_ids),
    )
    batch = processor.collate([sample] * run.data.batch_size)
    trainer = build_trainer(
        run, folder, [], None, max_steps=1, enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=1
    )
    start = time.perf_counter()
    trainer.fit(work.module, train_dataloaders=_Once(batch))
    rows, length = batch.input_ids.shape
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in provenance.peak_memory().items())
    console.print(
        f"One step on {rows} samples of {length} positions and {len(batch.views)} views: "
        f"{duration(time.perf_counter() - start)}, peak memory {memory}. Nothing was saved.",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True, slots=True)
class _Once:
    """A loader of one batch; Lightning would take a plain list for several loaders."""

    batch: MultimodalBatch

    def __iter__(self) -> Iterator[MultimodalBatch]:
        yield self.batch


def _first(source: Source) -> Iterator[Record]:
    return (source[index] for index in range(min(len(source), _LOOKED_AT)))


def _largest(record: Record, processor: Any) -> Record:
    size = full_grid_size(processor.plan, processor.vision)
    return replace(record, images=tuple(image.resize(size) for image in record.images))


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Progress | None]:
    """A bar where somebody watches."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def _share_cores(run: RunConfig) -> None:
    """Leave the data workers a core each: threads that wait for one another on too few cores spin most of the time."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - run.data.workers))


def _be_quiet() -> None:
    """What libraries tell everybody is not what this run's reader needs."""
    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in _KNOWN:
        warnings.filterwarnings("ignore", message=text)
