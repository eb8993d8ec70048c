"""What ``dry_run=true`` says of memory and of steps, of each device, without data, weights or network."""

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from deepstack_pl.batch import MultimodalBatch, Record, Role, Turn
from deepstack_pl.cli.assemble import SHIPPED
from deepstack_pl.cli.layout import collate_of, worst_rows
from deepstack_pl.cli.machines import Machines, wanted
from deepstack_pl.cli.schedule import expected_length
from deepstack_pl.config.run import RunConfig
from deepstack_pl.language.config import TooLong
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.build import PARTS
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.training.config import Checkpointing, Spread
from deepstack_pl.training.memory import ALLOWANCE, BACKWARD, LOSS, StepMemory, Unpredictable, predict
from deepstack_pl.training.sharding import replicas_of
from deepstack_pl.vision.views import full_grid_size

# Bytes that torch finds on the least of the GPUs sold under these sizes: some keep a share for error correction.
CARDS = {"24 GB": 22.0 * 2**30, "40 GB": 39.4 * 2**30, "80 GB": 79.1 * 2**30}


def print_memory(run: RunConfig, model: DeepStackForConditionalGeneration, console: Console) -> None:
    """Predict, and print it. ``model``, on the meta device and frozen as the stage says, is used up."""
    batch, gpu = longest_batch(run), run.trainer.get("accelerator") != "cpu"
    there = wanted(run)
    shares = there.world // replicas_of(run.strategy, there.world, there.nodes)
    _say(console, spread_of(run, there, shares))
    _say(console, step_of(run, batch, there.world))
    precision = str(run.trainer.get("precision") or "32-true")
    try:
        found = predict(model, batch, precision, gpu=gpu, strategy=run.strategy, shares=shares)
    except Unpredictable as error:
        _say(console, f"memory: {error} dry_run=step measures it.")
        return
    device = "a GPU" if gpu else "the CPU"
    where = device if there.world == 1 else f"each of {there.world} {'GPUs' if gpu else 'processes on the CPU'}"
    console.print(memory_table(found, f"memory of one step on {where}, predicted ({precision}, GiB)"))
    samples = "1 sample" if len(batch.keys) == 1 else f"{len(batch.keys)} samples"
    _say(
        console,
        f"Micro-batches of {samples}, as long as llm.max_length allows ({batch.input_ids.numel():,} positions), with "
        f"{len(batch.views)} views in all. {verdict(found, gpu)} dry_run=step measures the longest that there are.",
    )


def spread_of(run: RunConfig, there: Machines, shares: int) -> str:
    """What each process holds, and computes twice."""
    kind, how = run.strategy.kind, run.strategy.checkpointing
    across = f" on {there.nodes} machines" if there.nodes > 1 else ""
    said = f"{run.strategy.name}: {there.world} {'process' if there.world == 1 else 'processes'}{across}"
    if kind is Spread.ddp:
        said += ", each with the whole model"
    elif kind is not Spread.single:
        times = f", {there.world // shares} times" if there.world > shares else ""
        said += f"; weights, gradients and AdamW's states in {shares} shares{times}"
    again = "kept" if how is Checkpointing.none else f"computed again ({how.name})"
    return f"{said}. Activations are {again}."


def step_of(run: RunConfig, batch: MultimodalBatch, processes: int) -> str:
    """What an optimiser step is, and how many there are."""
    accumulation, units = run.data.accumulation(processes), run.data.micro_batch(processes)
    each = f"{accumulation} micro-batch{'' if accumulation == 1 else 'es'} of {units} in each process"
    most = batch.input_ids.numel() * accumulation * processes
    return f"A step: {each}, at most {most:,} positions in all. A run: {expected_length(run)}"


def longest_batch(run: RunConfig) -> MultimodalBatch:
    """The largest micro-batch there can be with an image a sample; of the values only the shapes are of use."""
    plan = build_plan(run.model, run.llm, run.vision)
    processor = DeepStackProcessor(
        load_tokenizer(None),
        plan=plan,
        vision=run.vision,
        template=SHIPPED,
        max_length=run.llm.max_length,
        too_long=TooLong.cut,
        backend=run.data.views.backend,
    )
    image = Image.new("RGB", full_grid_size(plan, run.vision))
    turns = (Turn(Role.user, "<image>\n?"), Turn(Role.assistant, "."))
    sample = processor.prepare(Record(key="", turns=turns, images=(image,)))
    return collate_of(run, processor)(worst_rows([sample], run, run.llm.max_length, wanted(run).world))


def memory_table(found: StepMemory, title: str) -> Table:
    """Terms by part."""
    table = Table(title=title)
    for name in ("", *PARTS, "not a part's", "all"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    held = {"weights": found.weights, "gradients": found.gradients, "AdamW's two states": found.optimiser}
    for term, by_part in held.items():
        table.add_row(term, *_cells(by_part))
    table.add_row("activations at worst", *_cells(found.peak, LOSS, BACKWARD))
    if found.gathered:
        table.add_row("weights gathered", *[""] * (len(PARTS) + 1), _gib(found.gathered))
    if found.update > sum(found.peak.values()) + found.gathered:
        table.add_row("AdamW's step, instead", *[""] * (len(PARTS) + 1), _gib(found.update))
    table.add_row("together", *[""] * (len(PARTS) + 1), _gib(found.total))
    table.caption = (
        f"not a part's: {LOSS} {_gib(found.peak.get(LOSS, 0))}, in {BACKWARD} {_gib(found.peak.get(BACKWARD, 0))}"
    )
    return table


def verdict(found: StepMemory, gpu: bool) -> str:
    """Where it fits."""
    if not gpu:
        return f"{_gib(found.total)} GiB, and the data workers' own."
    needed = found.total + ALLOWANCE
    fits = [card for card, size in CARDS.items() if needed <= size]
    fit = f"fits in {fits[0]}" if fits else f"does not fit in {[*CARDS][-1]}"
    smaller = [card for card in CARDS if card not in fits]
    fit += f", not in {smaller[-1]}" if fits and smaller else ""
    says = f"With {_gib(ALLOWANCE)} GiB that no tensor has (the driver's, libraries', gaps) {_gib(needed)} GiB: {fit}."
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        does = "fits" if needed <= here.total_memory else "does not fit"
        says += f" It {does} in the {here.name} here ({_gib(here.total_memory)} GiB)."
    return says


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cells(by_part: dict[str, int], *more: str) -> list[str]:
    others = sum(by_part.get(name, 0) for name in more)
    return [*(_gib(by_part.get(part, 0)) for part in PARTS), _gib(others) if more else "", _gib(sum(by_part.values()))]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
