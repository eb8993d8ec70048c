"""results.json, and what a person reads on the terminal when a run ends. Loads without torch."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepstack_pl.cli.folders import CHECKPOINTS, RESULTS, relative
from deepstack_pl.files import write_text
from deepstack_pl.training.checkpoints import all_of


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` in one stroke."""
    write_text(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """The results in ``folder``; empty where there are none."""
    file = folder / RESULTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_failure(folder: Path, arm: list[str], reason: str, status: str = "failed") -> None:
    """Record an arm of a sweep that has no report of its own, beside whatever it had found out."""
    write_results(folder, {**read_results(folder), "status": status, "reason": reason, "arm": arm})


def interval_of(metrics: dict[str, Any]) -> list[float] | None:
    """The accuracy's interval, whatever its confidence (``ci95``)."""
    return next((value for name, value in metrics.items() if name.startswith("ci")), None)


def share(value: float, interval: list[float] | None = None) -> str:
    """``0.937 [0.921, 0.950]``."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def duration(seconds: float) -> str:
    """``4 min 12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def metrics_table(results: dict[str, Any]) -> Table:
    """Accuracy by kind."""
    table = Table(title=f"{results['plan']['name']}: {results['steps']} of {results['max_steps']} steps")
    for name in ("kind", "accuracy", "exact match", "facts", "samples"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, found in results["metrics"].items():
        accuracy = share(found["accuracy"], interval_of(found))
        table.add_row(kind, accuracy, share(found["exact_match"]), f"{found['facts']:,}", f"{found['samples']:,}")
    return table


def benchmark_table(found: dict[str, Any]) -> Table:
    """The numbers of one benchmark, of all its samples and by kind."""
    table = Table(title=escape(found["name"]))
    names = [name for name, value in next(iter(found["metrics"].values())).items() if not isinstance(value, list)]
    for name in ("", *names):
        table.add_column(name.replace("_", " "), justify="right" if name else "left")
    for kind, values in found["metrics"].items():
        interval = next((value for value in values.values() if isinstance(value, list)), None)
        cells = [f"{values[name]:,}" if isinstance(values[name], int) else share(values[name]) for name in names]
        first = values[names[0]]
        if interval and isinstance(first, float):
            cells[0] = share(first, interval)
        table.add_row(escape(kind), *cells)
    return table


def benchmark_notes(found: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    left = found.get("not_asked", [])
    lines = [f"{len(left)} questions were not asked and count as not answered. {left[0]}"] if left else []
    if not found["injections"]:
        lines.append("injections=false: nothing was stacked")
    return lines


def summary(results: dict[str, Any], folder: Path) -> list[str]:
    """Cost and provenance, a line each."""
    seconds, parameters, tokens = results["seconds"], results["parameters"], results["tokens_per_image"]
    speed = results["tokens_per_second"]
    receipt = "every injection proven" if results["plan"]["injections"] else "an empty plan, nothing is stacked"
    begun = [f"started from the weights of {results['init_from']}"] if results["init_from"] else []
    left = results.get("not_asked", [])
    curves = "; tensorboard --logdir outputs" if any(folder.rglob("events.out.tfevents.*")) else ""
    return [
        *begun,
        *([f"not asked: {len(left)} held-out samples (results.json has all). {left[0]}"] if left else []),
        f"data: {results['data']['name']}, fingerprint {results['data']['fingerprint']['train'][:12]}",
        *_data(results["data"]["trained"]),
        f"visual tokens per image: {tokens['seen']} seen, {tokens['context']} in the context",
        f"parameters: {parameters['total']:,}, of which {parameters['trained']:,} trained",
        f"time: {duration(seconds['train'])} training, {duration(seconds['evaluate'])} evaluation"
        + (f"; {speed:,.0f} tokens/s" if speed else ""),
        *_speed(results.get("speed", {})),
        f"receipt: {receipt}",
        f"run: {relative(folder)}  (results.json{curves})",
    ]


def _speed(found: dict[str, float]) -> list[str]:
    """What the devices did at last, and where a step's time went, the largest part first."""
    lines = []
    if "speed/model_flops_per_second" in found:
        of = f" ({found['speed/mfu']:.1%} of the devices' peak)" if "speed/mfu" in found else ""
        work = f"{found['speed/model_flops_per_second'] / 1e12:,.3g} TFLOP/s{of}"
        lines.append(f"at last: {work}, {found['speed/padding_share']:.1%} of positions are padding")
    split = {name.removeprefix("split/"): value for name, value in found.items() if name.startswith("split/")}
    if split:
        whole = sum(split.values())
        parts = sorted(split, key=lambda part: -split[part])
        lines.append(f"a step of {whole:.3g} s: " + ", ".join(f"{part} {split[part] / whole:.0%}" for part in parts))
    return lines


def _data(trained: dict[str, Any]) -> list[str]:
    """What was not trained on as it stands in the data; and on what, where there are several sources."""
    lines = []
    if len(trained["sources"]) > 1:
        by = ", ".join(f"{count:,} {name}" for name, count in trained["sources"].items())
        lines.append(f"trained on {trained['samples']:,} samples: {by}")
    if trained["refused"]:
        by = ", ".join(f"{count:,} {reason}" for reason, count in trained["refused"].items())
        lines.append(f"refused: {by}  (ledger.jsonl)")
    if trained["cut_samples"]:
        lost = f"; {trained['cut_answers']:,} lost all answers" if trained["cut_answers"] else ""
        what = f"{trained['cut_samples']:,} samples longer than llm.max_length, {trained['cut_positions']:,} positions"
        lines.append(f"cut: {what}{lost}  (ledger.jsonl)")
    return lines


def print_report(console: Console, results: dict[str, Any], folder: Path) -> None:
    """The end of a run, for a person."""
    console.print(metrics_table(results))
    for line in summary(results, folder):
        console.print(line, soft_wrap=True, highlight=False)
    if results["interrupted"]:
        line = f"Interrupted at step {results['steps']}."
        if all_of(folder / CHECKPOINTS):
            line += f" To go on: python train.py ckpt_path={relative(folder)}"
        console.print(line, soft_wrap=True, highlight=False)
