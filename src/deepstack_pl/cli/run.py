"""One run, from a RunConfig to a report: plan, receipt, training, weights, evaluation."""

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from deepstack_pl.cli import checks, provenance
from deepstack_pl.cli.assemble import Assembly, assemble, model_builder, settle
from deepstack_pl.cli.folders import CONFIG, RECEIPT, checkpoint_of, claim, relative, remember, write_text
from deepstack_pl.cli.memory import print_memory
from deepstack_pl.cli.report import print_report, write_results
from deepstack_pl.cli.resume import Resumed, data_state_of, step_of
from deepstack_pl.cli.trial import one_step
from deepstack_pl.config.load import save
from deepstack_pl.config.run import DryRun, RunConfig
from deepstack_pl.evaluation.callback import log_results
from deepstack_pl.evaluation.runner import evaluate
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.training.parts import apply_stage

_KNOWN = (  # Lightning's advice that does not apply here
    ".*does not have many workers.*",
    ".*`val_dataloader`.*",
    ".*isinstance.*LeafSpec.*",
    ".*smaller than the logging interval.*",
)
# What a resume keeps of the results on disk: the rest is said anew, by what runs now.
_KEPT = ("metrics", "seconds", "tokens_per_second", "init_digest", "architecture_digest", "init_from", "arm", "starts")


def execute(
    run: RunConfig, folder: Path, command: str, *, arm: Sequence[str] = (), resumed: Resumed | None = None
) -> bool:
    """Run ``run`` in ``folder``, or try it as ``dry_run`` says; whether Ctrl-C ended it. ``command`` is for the record.

    Raises:
        ValueError: something that the user can mend.
    """
    console, memory = Console(), provenance.Memory.begin()
    _be_quiet()
    _share_cores(run)
    checks.check(run, fresh=resumed is None)
    notes = settle(run)
    if run.init_from and resumed is None:
        notes.append(f"starting from the weights of {relative(run.init_from)}")
    console.print(
        build_plan(run.model, run.llm, run.vision).draw() + "\n", markup=False, highlight=False, soft_wrap=True
    )
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    if run.trial is DryRun.true:
        model = model_builder(run, image_token_id=0)(device="meta")
        console.print(apply_stage(model, run.stage).table())
        print_memory(run, model, console)
        return False
    work = assemble(run, folder, fresh=resumed is None)
    for split, source in (("training", work.train), ("validation", work.val)):
        console.print(f"{split}: {source.describe()}", markup=False, highlight=False, soft_wrap=True)
    if work.datamodule.stream is not None:
        console.print(f"order: {work.datamodule.stream.describe()}", markup=False, highlight=False, soft_wrap=True)
    assert work.module.parts is not None
    console.print(work.module.parts.table())
    if run.trial is DryRun.step:
        one_step(run, folder, work, console, memory)
        return False
    return _Run(run, folder, work, console, command, list(arm), resumed, memory).whole()


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
    memory: provenance.Memory

    def whole(self) -> bool:
        self.start = 0
        if self.resumed:  # what is refused changes nothing on disk
            self.start = step_of(self.resumed.checkpoint)
            self.work.datamodule.require_same(data_state_of(self.resumed.checkpoint))
        self.results = self._begin()
        try:
            self._receipt()
            self._fit()
            self._evaluate()
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            reason = "stopped at once by Ctrl-C" if stopped else f"{type(error).__name__}: {error}"
            status = "interrupted" if stopped else "failed"
            self.results |= {"status": status, "interrupted": stopped, "reason": reason, "steps": self._step}
            tally = self.work.datamodule.tally_here()
            if tally.seen:
                self.results["data"] |= provenance.counts(tally)
            write_results(self.folder, self.results)
            self._say_how_to_go_on(error)
            raise
        print_report(self.console, self.results, self.folder)
        return self.work.stop.interrupted

    @property
    def _step(self) -> int:
        """Lightning counts from 0 until it has read the checkpoint."""
        return max(self.work.trainer.global_step, self.start)

    def _begin(self) -> dict[str, Any]:
        started = describe(self.run, self.work)
        if self.resumed is None:
            claim(self.folder)
            # So that going on needs nothing but this folder, wherever the run began.
            self.work.module.network.config.save_pretrained(self.folder)
            self.work.processor.save_pretrained(self.folder)
        else:
            started |= {name: self.resumed.results[name] for name in _KEPT if name in self.resumed.results}
            before = self.resumed.results.get("data", {})
            started["data"] |= {name: before[name] for name in ("order_digest", "trained") if name in before}
            self.console.print(
                f"going on with {relative(self.folder)} from {relative(self.resumed.checkpoint)} (step {self.start})",
                soft_wrap=True,
                highlight=False,
            )
        started["steps"] = self.start
        began = {"command": provenance.without_passwords(self.command), "step": self.start}
        began |= {name: started[name] for name in ("device", "versions", "git")}
        started["starts"] = [*started.get("starts", []), began]
        started.setdefault("arm", self.arm)
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
        start, work = time.perf_counter(), self.work
        checkpoint = str(self.resumed.checkpoint) if self.resumed else None
        try:
            work.trainer.fit(work.module, datamodule=work.datamodule, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:  # what Lightning makes of a Ctrl-C that did not end in good order
            if work.stop.interrupted or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        finally:
            self._count(time.perf_counter() - start)
        self.results |= {"steps": self._step, "interrupted": self._step < self.run.trainer["max_steps"]}
        self.results["data"] |= provenance.counts(work.datamodule.tally())
        (self.folder / "hparams.yaml").unlink(missing_ok=True)  # the TensorBoard logger's; config.yaml says it all
        work.module.network.save_pretrained(self.folder)
        work.processor.save_pretrained(self.folder)

    def _count(self, took: float) -> None:
        """Time and speed of all starts together; a start that only evaluates leaves them as they were."""
        seconds, throughput = self.results["seconds"], self.work.throughput
        seconds["fit"] = seconds.get("fit", 0.0) + took
        if throughput is None:
            seconds["train"] += took
            return
        before, now, speed = seconds["train"], throughput.seconds_training, throughput.tokens_per_second_overall
        if speed is not None:
            tokens = before * (self.results["tokens_per_second"] or 0.0) + now * speed
            seconds["train"] = before + now
            self.results["tokens_per_second"] = tokens / (before + now)

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
        peaks = self.memory.peaks()
        self.results |= {"status": status, "metrics": found.metrics, "peak_memory_bytes": peaks}
        self.results["not_asked"] = list(found.not_asked)
        write_results(self.folder, self.results)

    def _say_how_to_go_on(self, error: BaseException) -> None:
        try:
            back = step_of(checkpoint_of(self.folder))
        except ValueError:
            return  # nothing was saved, or not to the end
        self.console.print(
            f"Stopped by {type(error).__name__} at step {self._step}. To go on from step {back}, the newest "
            f"checkpoint's: python train.py ckpt_path={relative(self.folder)}",
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
        "interrupted": False,
        "max_steps": run.trainer["max_steps"],
        "init_from": relative(run.init_from) if run.init_from else None,
        "metrics": {},
        "plan": {"name": plan.name, "digest": plan.digest, "injections": [str(i) for i in plan.injections]},
        "tokens_per_image": {"seen": plan.seen_tokens(per_view), "context": plan.context_tokens(per_view)},
        "parameters": {"total": parts.parameters, "trained": parts.trained, "by_part": parts.to_dict()["parts"]},
        "steps": 0,
        "seconds": {"train": 0.0, "fit": 0.0, "evaluate": 0.0},
        "tokens_per_second": None,
        "seed": run.seed,
        "data": provenance.data_of(work.train, work.val, run),
        **provenance.weight_digests(work.module.network),
        "device": provenance.device_name(work.trainer.strategy.root_device),
        "versions": provenance.versions(),
        "git": provenance.git(),
    }


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
        torch.set_num_threads(max(1, _cores() - run.data.workers))


def _cores() -> int:
    """Cores that this process may use: a container or a batch system often lends fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _be_quiet() -> None:
    """What libraries tell everybody is not what this run's reader needs."""
    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in _KNOWN:
        warnings.filterwarnings("ignore", message=text)
