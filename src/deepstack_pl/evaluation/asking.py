"""A benchmark asked of a model, over all processes, and kept as it goes."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepstack_pl.evaluation.benchmark import Benchmark, Line
from deepstack_pl.evaluation.config import TasksConfig
from deepstack_pl.evaluation.kept import Kept, Others, read_results
from deepstack_pl.evaluation.runner import answers, no_room
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.processes import from_all, from_first, rank

Advance = Callable[[int], None]  # told how many questions were answered


def ask(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    benchmark: Benchmark,
    config: TasksConfig,
    *,
    first: int | None = None,
    injections: bool = True,
    known: Mapping[int, Line] | None = None,
    keep: Callable[[list[Line]], None] = lambda lines: None,
    advance: Advance = lambda count: None,
) -> list[Line]:
    """Answers to the ``first`` questions (None: all), in their order; those of ``known`` are taken as they are. All
    processes share the others, and all get all.
    """
    found = dict(known or {})
    left = [index for index in range(min(len(benchmark), first or len(benchmark))) if index not in found]
    made: list[Line] = []
    for batch in answers(
        model,
        processor,
        benchmark.record,
        left,
        refuse=lambda record: no_room(processor, record),
        batch_size=config.batch_size,
        max_new_tokens=benchmark.config.max_new_tokens,
        injections=injections,
    ):
        lines = benchmark.judge([(each.index, each.text, each.not_asked) for each in batch])
        keep(lines)
        made += lines
        advance(len(lines))
    found |= {line.index: line for each in from_all(made) for line in each}
    return [found[index] for index in sorted(found)]


def ask_and_keep(
    model: DeepStackForConditionalGeneration,
    processor: DeepStackProcessor,
    benchmark: Benchmark,
    config: TasksConfig,
    folder: Path,
    *,
    made_by: Mapping[str, Any],
    facts: Mapping[str, Any],
    others: Others = Others.refused,
    injections: bool = True,
    advance: Advance = lambda count: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Ask all of ``benchmark`` and keep answers and results in ``folder``; what lies there already is not asked again.

    Args:
        made_by: what the answers depend on beside the benchmark: weights, precision, versions.
        facts: goes into the results: command, device.

    Raises:
        ValueError: the folder holds answers that something else made, or another program writes there.
    """
    kept = Kept(folder, rank())
    task = {key: value for key, value in asdict(benchmark.config).items() if key not in ("root", "samples")}
    asked = {"task": task, "questions": len(benchmark), "fingerprint": benchmark.fingerprint, "injections": injections}
    asked["pictures"] = benchmark.pictures
    with closing(kept):
        known = _begin(kept, {**asked, **made_by}, others, say)
        advance(len(known))
        start = time.perf_counter()
        if kept.finished and len(known) == len(benchmark):
            before = from_first(read_results(folder) if rank() == 0 else {})
            lines = [known[index] for index in sorted(known)]
            said = {"metrics": benchmark.metrics(lines, config.confidence), "root": benchmark.config.root}
            if rank() == 0:
                kept.finish(lines, before | said)
            return before | said
        lines = ask(
            model,
            processor,
            benchmark,
            config,
            injections=injections,
            known=known,
            keep=kept.keep,
            advance=advance,
        )
        results = {
            "name": benchmark.name,
            "metrics": benchmark.metrics(lines, config.confidence),
            **asked,
            "root": benchmark.config.root,
            "source": benchmark.task.source,
            "left_out": benchmark.left_out,
            "not_asked": [line.not_asked for line in lines if line.not_asked is not None],
            "seconds": time.perf_counter() - start,
            "answered_before": len(known),
            "batch_size": config.batch_size,
            **made_by,
            **facts,
        }
        if rank() == 0:
            kept.finish(lines, results)
        from_all(None)  # nobody leaves before the results are there
    return results


def _begin(kept: Kept, identity: dict[str, Any], others: Others, say: Callable[[str], None]) -> dict[int, Line]:
    """What is known; the first process says for all what is wrong."""
    problem: str | None = None
    if rank() == 0:
        try:
            aside = kept.begin(identity, others)
            if aside is not None:
                say(f"what lay there is in {aside}")
        except ValueError as error:
            problem = str(error)
    problem = from_first(problem)
    if problem is not None:
        raise ValueError(problem)
    known = from_first(kept.lines() if rank() == 0 else {})
    if known:
        say(f"{kept.folder}: {len(known):,} answers are there already")
    return known
