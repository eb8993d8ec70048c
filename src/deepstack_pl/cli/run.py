"""One run, from a RunConfig to a report: plan, receipt, training, weights, evaluation."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning
from rich.console import Console

from deepstack_pl import processes
from deepstack_pl.cli import checks, provenance
from deepstack_pl.cli.assemble import Assembly, assemble, device_of, model_builder, settle
from deepstack_pl.cli.description import describe
from deepstack_pl.cli.ending import ending_at_once, number_here
from deepstack_pl.cli.evaluation import at_the_end
from deepstack_pl.cli.folders import CONFIG, RECEIPT, alone, claim, relative, remember
from deepstack_pl.cli.launch import launch
from deepstack_pl.cli.machines import require_device, require_group, started, wanted
from deepstack_pl.cli.memory import print_memory
from deepstack_pl.cli.report import print_report, write_results
from deepstack_pl.cli.resume import Resumed, how_to_go_on, whole
from deepstack_pl.cli.spread import spread
from deepstack_pl.cli.surroundings import bar_on, be_quiet, share_cores
from deepstack_pl.cli.trial import one_step
from deepstack_pl.config.load import flat, save
from deepstack_pl.config.run import DryRun, RunConfig
from deepstack_pl.evaluation.callback import log_benchmark, log_results
from deepstack_pl.evaluation.runner import evaluate
from deepstack_pl.files import write_text
from deepstack_pl.inspection.hparams import log_hparams
from deepstack_pl.inspection.record import Receipt
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.processes import from_all, from_first, rank
from deepstack_pl.training.config import PREEMPTED
from deepstack_pl.training.parts import apply_stage
from deepstack_pl.training.restore import read_plain
from deepstack_pl.training.sharding import gathered

# What a resume keeps of the results on disk: the rest is said anew, by what runs now.
_KEPT = ("metrics", "curve", "seconds", "flops", "tokens_per_second", "speed")
_KEPT += ("init_digest", "architecture_digest", "init_from", "arm", "starts")


def execute(
    run: RunConfig,
    folder: Path,
    command: str,
    *,
    arm: Sequence[str] = (),
    resumed: Resumed | None = None,
    held: bool = False,
) -> bool:
    """Run ``run`` in ``folder``, or try it as ``dry_run`` says; whether Ctrl-C ended it. ``command`` is for the record.
    ``held``: who has started this process keeps others out of the folder.

    Where several processes are wanted and this is none of them yet, they are started, each calls this again, and
    their end is waited for.

    Raises:
        ValueError: something that the user can mend.
        SystemExit: the machine was wanted for something else (`PREEMPTED`).
    """
    checks.check(run, fresh=resumed is None)
    there, grouped = wanted(run), started()
    real = run.trial is not DryRun.true
    if grouped and real:  # also of one: each of the others would make the whole run by itself
        require_group(there)
        require_device(run)
    several = there.world > 1 and real
    if several and not grouped:
        return launch(run, folder, command, arm, resumed)
    if grouped and not real and number_here():
        return False  # process 0 says it
    with ending_at_once():
        if several:
            processes.join(run.strategy.start_timeout, device_of(run))  # for good: the process ends with its run
        folder = Path(from_first(str(folder)))
        holds = run.trial is DryRun.false and not processes.rank() and not held
        with alone(folder, free=resumed is None and not arm) if holds else nullcontext():
            return _here(run, folder, command, arm, resumed)


def _here(run: RunConfig, folder: Path, command: str, arm: Sequence[str], resumed: Resumed | None) -> bool:
    """`execute`, in this process."""
    console, memory = Console(quiet=rank() > 0), provenance.Memory.begin()
    be_quiet()
    share_cores(run)
    notes = settle(run)
    if run.init_from and resumed is None:
        notes.append(f"starting from the weights of {relative(run.init_from)}")
    for text in (build_plan(run.model, run.llm, run.vision).draw() + "\n", *notes):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    if run.trial is DryRun.true:
        model = model_builder(run, image_token_id=0)(device="meta")
        console.print(apply_stage(model, run.stage).table())
        print_memory(run, model, console)
        return False
    epochs = run.data.epochs
    work = assemble(run, folder, fresh=resumed is None)
    for split, source in (("training", work.train), ("validation", work.val)):
        console.print(f"{split}: {source.describe()}", markup=False, highlight=False, soft_wrap=True)
    if work.datamodule.stream is not None:
        console.print(f"order: {work.datamodule.stream.describe()}", markup=False, highlight=False, soft_wrap=True)
    if epochs is not None:
        console.print(f"data.epochs={epochs:g}: {run.trainer['max_steps']:,} steps", highlight=False, soft_wrap=True)
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
        self.start, self.checkpoint = 0, None
        if self.resumed:  # what is refused changes nothing on disk
            found, passed = whole(self.resumed)
            for line in [*self.resumed.notes, *passed]:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.start, self.checkpoint = found.step, found.folder
            self.work.datamodule.require_same(read_plain(found)[type(self.work.datamodule).__name__])
        self.results: dict[str, Any] = {}
        try:
            if self.first:
                self._begin()
            self.results = from_first(self.results)
            self._spread()
            self._fit()
            if not self.work.stop.preempted:
                self._evaluate()
        except BaseException as error:
            if not self.results:  # nothing is on disk that says it runs
                raise
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            by = "by Ctrl-C" if isinstance(error, KeyboardInterrupt) else "because the machine was wanted"
            reason = f"stopped at once {by}" if stopped else f"{type(error).__name__}: {error}"
            status = "interrupted" if stopped else "failed"
            self.results |= {"status": status, "interrupted": stopped, "reason": reason, "steps": self._step}
            tally = self.work.datamodule.tally_here()
            if tally.seen:
                self.results["data"] |= provenance.counts(tally)
            with suppress(OSError):  # on a full disk too, what ended the run is what must be said
                self._write()
            self._say_how_to_go_on("Stopped" if stopped else f"Stopped by {type(error).__name__}")
            raise
        if self.work.stop.preempted:
            self._preempted()
        if self.first:
            print_report(self.console, self.results, self.folder)
        return self.work.stop.interrupted

    @property
    def first(self) -> bool:
        """Process 0 writes and says what is of all."""
        return rank() == 0

    def _write(self) -> None:
        if self.first:
            write_results(self.folder, self.results)

    def _preempted(self) -> NoReturn:
        """Nothing more than is needed to go on: time is short."""
        self.results |= {"status": "interrupted", "interrupted": True, "reason": "the machine was wanted"}
        self._write()
        self._say_how_to_go_on("Preempted")
        raise SystemExit(PREEMPTED)

    @property
    def _step(self) -> int:
        """Lightning counts from 0 until it has read the checkpoint."""
        return max(self.work.trainer.global_step, self.start)

    def _begin(self) -> None:
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
                f"going on with {relative(self.folder)} from {relative(self.checkpoint or '')} (step {self.start})",
                soft_wrap=True,
                highlight=False,
            )
        started["steps"] = self.start
        began = {"command": provenance.without_passwords(self.command), "step": self.start}
        began |= {name: started[name] for name in ("device", "versions", "git")}
        started["starts"] = [*started.get("starts", []), began]
        started.setdefault("arm", self.arm)
        save(self.run, self.folder / CONFIG)
        self.results = started
        write_results(self.folder, started)
        remember(self.folder)

    def _spread(self) -> None:
        """The receipt, taken here, so that it is on disk and on the terminal before anything can fail on it; then what
        is put on the model from outside.
        """
        receipt = self.work.inspection.receipt = spread(self.run, self.work, self._keep, self.console)
        self.results["receipt"] = {"ok": receipt.ok, "injections": len(receipt.rows)}

    def _keep(self, receipt: Receipt) -> None:
        write_text(self.folder / RECEIPT, json.dumps(receipt.to_dict(), indent=2) + "\n")
        self.console.print(receipt.table())

    def _fit(self) -> None:
        start, work = time.perf_counter(), self.work
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        try:
            work.trainer.fit(work.module, datamodule=work.datamodule, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:  # what Lightning makes of a Ctrl-C that did not end in good order
            if error.code != PREEMPTED and (work.stop.asked or isinstance(error.__context__, KeyboardInterrupt)):
                raise KeyboardInterrupt from error
            raise
        finally:
            self._count(time.perf_counter() - start)
        self.results |= {"steps": self._step, "interrupted": self._step < self.run.trainer["max_steps"]}
        self.results["data"] |= provenance.counts(work.datamodule.tally())
        skipped = work.module.skipped
        if skipped:
            self.results["skipped_steps"] = [step for step, _ in skipped]
        if work.stop.preempted:
            return
        weights = gathered(work.module.network)
        if self.first:
            work.module.network.save_pretrained(self.folder, state_dict=weights)
            work.processor.save_pretrained(self.folder)

    def _count(self, took: float) -> None:
        """Time and speed of all starts together; a start that only evaluates leaves them as they were."""
        seconds, throughput = self.results["seconds"], self.work.throughput
        seconds["fit"] = seconds.get("fit", 0.0) + took
        self.results["speed"] |= self.work.speed
        before = [point for point in self.results["curve"] if point["step"] <= self.start]
        self.results["curve"] = before + self.work.generation.history
        if throughput is None:
            seconds["train"] += took
            return
        self.results["flops"] += throughput.flops_overall
        before, now, speed = seconds["train"], throughput.seconds_training, throughput.tokens_per_second_overall
        if speed is not None:
            tokens = before * (self.results["tokens_per_second"] or 0.0) + now * speed
            seconds["train"] = before + now
            self.results["tokens_per_second"] = tokens / (before + now)

    def _evaluate(self) -> None:
        start, config = time.perf_counter(), self.run.evaluation
        network = self.work.module.to(self.work.trainer.strategy.root_device).network
        with bar_on(self.console) as progress:
            found = evaluate(network, self.work.processor, self.work.val, config, config.final_samples, progress)
        self.results |= {"metrics": found.metrics, "not_asked": list(found.not_asked)}
        asked = self.work.generation.benchmarks
        benchmarks = at_the_end(self.folder, network, self.work.processor, asked, config, self.console, self.results)
        peaks = from_all(self.memory.peaks())
        if not self.first:
            return
        loggers = self.work.trainer.loggers
        logged = log_results(loggers, found, self._step, prefix="final")
        for name, metrics in benchmarks.items():
            logged += log_benchmark(loggers, name, metrics, self._step, prefix="final")
        log_hparams(loggers, flat(self.run), logged)
        for logger in loggers:
            logger.finalize("success")  # these numbers come after Lightning's own
        (self.folder / "hparams.yaml").unlink(missing_ok=True)  # the TensorBoard logger's; config.yaml says it all
        lines = [json.dumps(record.to_dict(), ensure_ascii=False) for record in found.records]
        write_text(self.folder / "predictions.jsonl", "\n".join(lines) + "\n")
        self.results["seconds"]["evaluate"] += time.perf_counter() - start
        status = "interrupted" if self.results["interrupted"] else "finished"
        most = {name: max(each.get(name, 0) for each in peaks) for name in peaks[0]}  # of any one process
        self.results |= {"status": status, "peak_memory_bytes": most}
        self.results |= {"benchmarks": benchmarks} if benchmarks else {}
        write_results(self.folder, self.results)

    def _say_how_to_go_on(self, ended: str) -> None:
        way = how_to_go_on(self.folder)
        if way is not None:
            text = f"{ended} at step {self._step}. {way}"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
