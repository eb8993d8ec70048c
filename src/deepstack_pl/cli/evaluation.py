"""A model asked benchmarks, or its run's own held-out samples: what ``python evaluate.py`` does."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from deepstack_pl import processes
from deepstack_pl.cli.export import require_finished
from deepstack_pl.cli.folders import CONFIG, RESULTS, relative, with_model
from deepstack_pl.cli.machines import started
from deepstack_pl.cli.provenance import device_name, git, versions, without_passwords
from deepstack_pl.cli.report import benchmark_notes, benchmark_table, share
from deepstack_pl.cli.surroundings import bar_on, be_quiet
from deepstack_pl.config.evaluate import EvaluateConfig
from deepstack_pl.config.load import load
from deepstack_pl.data.sources import open_sources
from deepstack_pl.evaluation.asking import ask_and_keep
from deepstack_pl.evaluation.benchmark import Benchmark
from deepstack_pl.evaluation.config import FOLDER, HELD_OUT, WITHOUT, TasksConfig
from deepstack_pl.evaluation.intervals import interval_name
from deepstack_pl.evaluation.kept import Others
from deepstack_pl.evaluation.runner import evaluate
from deepstack_pl.files import write_text
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.processes import from_first, rank, several

_TIMEOUT = 3600.0  # seconds that one process waits for another: shares of a benchmark take unequally long
# Whose version may change an answer.
_MAKERS = ("torch", "transformers", "open_clip", "pillow", "simplejpeg", "deepstack_pl")


def execute(config: EvaluateConfig, command: str) -> None:
    """Ask, score, keep and report.

    Raises:
        ValueError: something that the user can mend.
    """
    folder = with_model(Path(config.ckpt))
    require_finished(folder)
    where = Path(config.to) if config.to else folder / FOLDER
    if where.exists() and not where.is_dir():
        raise ValueError(f"to={where} is a file, but answers need a folder. Name one, or one that is not there yet.")
    device = _device(config)
    if started():
        processes.join(_TIMEOUT, device)
    console = Console(quiet=rank() > 0, soft_wrap=True, highlight=False)
    be_quiet()
    benchmarks = [Benchmark.open(name, task) for name, task in config.evaluation.tasks.items()]
    for benchmark in benchmarks:
        console.print(benchmark.describe(), markup=False)
    model, processor = _load(folder, config, device)
    made_by = from_first(made_by_model(folder, model) if rank() == 0 else {})
    facts: dict[str, Any] = {"ckpt": relative(folder), "command": without_passwords(command)}
    facts |= {"git": git(), "device": device_name(device)}
    if not benchmarks:
        _held_out(config, folder, where, model, processor, {**made_by, **facts}, console)
    ask_benchmarks(
        model,
        processor,
        benchmarks,
        config.evaluation,
        where,
        console,
        made_by=made_by,
        facts=facts,
        others=Others.all_renamed if config.fresh else Others.refused,
        injections=config.injections,
    )


def at_the_end(
    folder: Path,
    network: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    benchmarks: Sequence[Benchmark],
    config: TasksConfig,
    console: Console,
    results: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """What benchmarks say of a run that has trained, kept as evaluate.py keeps it; what earlier weights of it answered
    gets another name. ``results`` are the run's: training is done, and a benchmark that cannot be asked to its end is
    said there.
    """
    if not benchmarks:
        return {}
    made_by = from_first(made_by_model(folder, network) if rank() == 0 else {})
    facts = {"ckpt": relative(folder), "command": results["starts"][-1]["command"]}
    facts |= {name: results[name] for name in ("device", "git")}
    found: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        try:
            found |= ask_benchmarks(
                network,
                processor,
                [benchmark],
                config,
                folder / FOLDER,
                console,
                made_by=made_by,
                facts=facts,
                others=Others.renamed,
            )
        except (ValueError, OSError) as error:
            if several():  # the other processes wait for this one
                raise
            console.print(f"{benchmark.name}: {error}", markup=False, highlight=False, soft_wrap=True)
            results.setdefault("benchmarks_failed", {})[benchmark.name] = str(error)
    return found


def ask_benchmarks(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    benchmarks: Sequence[Benchmark],
    config: TasksConfig,
    where: Path,
    console: Console,
    *,
    made_by: dict[str, Any],
    facts: dict[str, Any],
    others: Others = Others.refused,
    injections: bool = True,
) -> dict[str, dict[str, Any]]:
    """Ask all, keep each in a folder of its own in ``where`` and say what was found; by name, its numbers."""
    metrics: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        place = where / _name(benchmark.name, injections)
        with bar_on(console) as progress:
            advance = _advance(progress, benchmark)
            found = ask_and_keep(
                model,
                processor,
                benchmark,
                config,
                place,
                made_by=made_by,
                facts=facts,
                others=others,
                injections=injections,
                advance=advance,
                say=lambda text: console.print(text, markup=False),
            )
        console.print(benchmark_table(found))
        for line in [*benchmark_notes(found), f"results.json, records.jsonl: {relative(place)}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        metrics[benchmark.name] = found["metrics"]
    return metrics


def _advance(progress: Progress | None, benchmark: Benchmark) -> Callable[[int], None]:
    if progress is None:
        return lambda count: None
    return partial(progress.advance, progress.add_task(benchmark.name, total=len(benchmark)))


def _name(name: str, injections: bool) -> str:
    return name if injections else f"{name}{WITHOUT}"


def _device(config: EvaluateConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ValueError("device=cuda, but torch finds no GPU here. Say device=cpu, or leave it out.")
    if config.device == "cpu" or not there:
        return torch.device("cpu")
    number, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= here:
        raise ValueError(f"process {number} of this machine takes a GPU of its own, but there are {here}. Start fewer.")
    return torch.device("cuda", number)


def _load(
    folder: Path, config: EvaluateConfig, device: torch.device
) -> tuple[DeepStackForConditionalGeneration, DeepStackProcessor]:
    options: dict[str, Any] = {}
    if config.dtype is not None:
        options["dtype"] = getattr(torch, config.dtype.value)
    if config.attention is not None:
        options["attn_implementation"] = config.attention.value
    model = DeepStackForConditionalGeneration.from_pretrained(folder, **options)
    return model.to(device).eval(), DeepStackProcessor.from_pretrained(folder)


def made_by_model(folder: Path, model: DeepStackForConditionalGeneration) -> dict[str, Any]:
    """What answers depend on beside the questions: every byte of the model, and what computes."""
    digest = hashlib.sha256()
    names = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*")
    for file in sorted(file for name in names for file in folder.glob(name)):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    known = versions()
    return {
        "model": digest.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "hardware": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "versions": {name: known[name] for name in _MAKERS},
    }


def _held_out(
    config: EvaluateConfig,
    folder: Path,
    where: Path,
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    facts: dict[str, Any],
    console: Console,
) -> None:
    """The samples that the run kept from training, as its own last evaluation asked them."""
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is no run of train.py, and has no held-out samples of its own. Say which benchmarks to ask: "
            "'evaluation=[textvqa,docvqa]'; python evaluate.py --help names all."
        )
    asked = config.evaluation
    if (asked.batch_size, asked.confidence) != (TasksConfig().batch_size, TasksConfig().confidence):
        raise ValueError(
            f"evaluation.batch_size={asked.batch_size} evaluation.confidence={asked.confidence}: a run's own samples "
            "are asked as its config.yaml says. Leave both out, or name benchmarks with them."
        )
    place = where / _name(HELD_OUT, config.injections)
    if (place / RESULTS).is_file() and not config.fresh:
        raise ValueError(f"{place} holds answers already. Say fresh=true to replace them, or to=FOLDER.")
    run = load(folder / CONFIG, [])
    source = open_sources(run.data)[1]
    console.print(f"held out: {source.describe()}", markup=False)
    start = time.perf_counter()
    with bar_on(console) as progress:
        its = run.evaluation
        found = evaluate(model, processor, source, its, its.final_samples, progress, injections=config.injections)
    if rank():
        return
    (place / RESULTS).unlink(missing_ok=True)  # until all of it is there
    lines = [json.dumps(record.to_dict(), ensure_ascii=False) for record in found.records]
    write_text(place / "predictions.jsonl", "\n".join(lines) + "\n")
    results = {
        "name": HELD_OUT,
        "metrics": found.metrics,
        "fingerprint": source.fingerprint,
        "injections": config.injections,
        "not_asked": list(found.not_asked),
        "seconds": time.perf_counter() - start,
        **facts,
    }
    write_text(place / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    interval = interval_name(its.confidence)
    for kind, values in found.metrics.items():
        said = share(values["accuracy"], values[interval])
        console.print(f"{kind}: {said} of {values['facts']:,} facts", markup=False)
    for line in benchmark_notes(results):
        console.print(line, markup=False)
    console.print(f"results.json, predictions.jsonl: {relative(place)}", markup=False)
