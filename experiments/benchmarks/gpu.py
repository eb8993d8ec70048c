"""Training steps of real size on one GPU: tokens a second, model FLOPs against the card's peak, memory, split.

Phi-3-mini's and Vicuna-7B's shapes with CLIP ViT-L/14 at 336 pixels, DeepStack-L, drawn at random on the device; bf16
weights, gradients and AdamW's states (`trainer.precision=bf16-true`). Samples like LLaVA-665K's at full size: 576
positions an image, five views each, a fifth text alone, packed into rows of 2,048. The same LLM on text alone, in the
same run, is the ceiling. Needs torch 2.10 or newer with CUDA, transformers and einops; no weights, no hub, no
open_clip, nothing installed. A compiler is used if there is one. The table is written anew after every case, and no
case is begun that might not end in time.

    make bench-gpu          (python experiments/benchmarks/gpu.py: in ten minutes)
    python experiments/benchmarks/gpu.py --smoke            tiny, on whatever is there: whether it runs

The least that a run of ours should reach on an H200: 45 % of 989 TFLOP/s in finetune of the Phi-3-sized model.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "src"))


class _Missing(types.ModuleType):
    """A part of a library that is not installed here and that nothing below calls; its classes have no instances, and
    may stand in annotations with a shape (jaxtyping's).
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, shape: cls)})


class _StandIns(MetaPathFinder, Loader):
    """Imports `_Missing` for every part of ``libraries``."""

    def __init__(self, libraries: list[str]) -> None:
        self.libraries = libraries

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        known = fullname.partition(".")[0] in self.libraries
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Missing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def needs() -> list[str]:
    """What this cannot do without and does not find."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "einops")}
    lacking = [name for name, there in found.items() if not there]
    if found["transformers"] and int(version("transformers").partition(".")[0]) < 5:
        lacking.append(f"transformers 5.16 or newer (this is {version('transformers')})")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        lacking.append(f"torch 2.10 or newer (this is {torch.__version__})")
    return lacking


if lacking := needs():
    raise SystemExit(f"No figures without {', '.join(lacking)}: install that beside torch, and start again.")
MISSING = [name for name in ("open_clip", "timm", "peft", "jaxtyping") if importlib.util.find_spec(name) is None]
sys.meta_path.insert(0, _StandIns(MISSING))

# Below the stand-ins: these import what may be missing.
from deepstack_pl.batch import PadSide, Sample, collate  # noqa: E402
from deepstack_pl.language.config import Attention, LLMConfig  # noqa: E402
from deepstack_pl.multimodal.build import build_model, parts  # noqa: E402
from deepstack_pl.multimodal.config import ProjectorConfig  # noqa: E402
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration  # noqa: E402
from deepstack_pl.stacking.config import ModelConfig  # noqa: E402
from deepstack_pl.stacking.mosaic import image_tables  # noqa: E402
from deepstack_pl.training.clock import PARTS, StepClock  # noqa: E402
from deepstack_pl.training.compiling import compile_blocks  # noqa: E402
from deepstack_pl.training.config import Checkpointing  # noqa: E402
from deepstack_pl.training.flops import FlopsCounter, peak_of  # noqa: E402
from deepstack_pl.training.sharding import checkpoint_activations  # noqa: E402
from deepstack_pl.vision.config import VisionConfig, VisionLibrary  # noqa: E402

TARGET = 0.45
LLAMA = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": 0}
SIZES = {
    "phi3-mini": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "vocab_size": 32064},
    "vicuna-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 512}
CLIP = VisionConfig(name="clip_l_336", library=VisionLibrary.huggingface, family="clip_vision_model")
PLANS = {
    "deepstack_l": ModelConfig(name="deepstack_l", start_layer=1),
    "text": ModelConfig(name="baseline", tiles=0, groups=0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    size: str
    stage: str  # text, pretrain, finetune
    packed: bool = True
    compiled: bool = False
    checkpointing: Checkpointing = Checkpointing.none
    rows: int = 4  # of 2,048 positions in a forward


CASES = [
    *(Case("phi3-mini", stage, compiled=compiled) for compiled in (False, True) for stage in ("text", "finetune")),
    Case("phi3-mini", "finetune", packed=False),
    Case("phi3-mini", "finetune", checkpointing=Checkpointing.full, rows=8),
    Case("phi3-mini", "pretrain"),
    Case("phi3-mini", "pretrain", packed=False),
    Case("vicuna-7b", "text", checkpointing=Checkpointing.full),
    Case("vicuna-7b", "finetune", checkpointing=Checkpointing.full),
    Case("vicuna-7b", "finetune", compiled=True, checkpointing=Checkpointing.full),
    Case("vicuna-7b", "pretrain"),
]


def llm_of(size: str, packed: bool, smoke: bool) -> LLMConfig:
    values = TINY if smoke else SIZES[size]
    heads = 4 if smoke else 32
    kernel = Attention.varlen if packed else Attention.sdpa
    architecture = {**LLAMA, **values, "num_attention_heads": heads, "num_key_value_heads": heads}
    return LLMConfig(name=size, family="llama", attention=kernel, architecture=architecture)


def vision_of(smoke: bool) -> VisionConfig:
    return replace(CLIP, image_size=56, width=32, layers=4, heads=2) if smoke else CLIP


def model_of(case: Case, device: torch.device, smoke: bool) -> DeepStackForConditionalGeneration:
    """Frozen as the stage says, in bfloat16 on a GPU. Weights are drawn where they stay."""
    llm, plan = llm_of(case.size, case.packed, smoke), PLANS["text" if case.stage == "text" else "deepstack_l"]
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(half)
    try:
        image_token = int(llm.architecture["vocab_size"])
        projector = ProjectorConfig(name="mlp")
        model = build_model(
            plan, llm, vision_of(smoke), projector, seed=0, image_token_id=image_token, device=str(device)
        )
    finally:
        torch.set_default_dtype(before)
    trained = {"text": {"llm"}, "pretrain": {"projector"}, "finetune": {"projector", "llm"}}[case.stage]
    for part, named in parts(model).items():
        for _, parameter in named:
            parameter.requires_grad_(part in trained)
    checkpoint_activations(model, case.checkpointing)
    if case.compiled:
        compile_blocks(model)
    return model.train()


def samples(model: DeepStackForConditionalGeneration, case: Case, capacity: int) -> Iterator[Sample]:
    """Endless: four with an image and some text, then a text alone."""
    rng, plan, vision = np.random.default_rng(0), model.plan, model.config.typed_vision()
    vocabulary, side = model.config.text_config.vocab_size, vision.patches_per_side
    grid = (2, 2) if plan.tiles else None
    tables, number = image_tables(plan, grid, side), 0
    slots = len(tables.sequence)
    while True:
        alone = number % 5 == 4 or case.stage == "text"
        mean = 900 if alone else 190
        most = capacity if alone else capacity - slots
        text = int(np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8), 8, most)) if case.stage != "text" else capacity
        images = 0 if alone else 1
        ids = torch.cat(
            [
                torch.full((images * slots,), model.config.image_token_id),
                torch.from_numpy(rng.integers(3, vocabulary, text)),
            ]
        )
        labels = ids.clone()
        labels[: images * slots + int(0.4 * text)] = -100
        views = torch.randint(
            0, 256, (images * (5 if grid else 1), 3, vision.image_size, vision.image_size), dtype=torch.uint8
        )
        yield Sample(
            key=f"sample {number}",
            input_ids=ids,
            labels=labels,
            views=views,
            images=images,
            token_index=torch.cat([torch.arange(images * slots), torch.full((text,), -1)]),
            sequence_rows=tables.sequence[: images * slots],
            group_rows=tables.llm[:, : images * slots],
            vit_rows=tables.vit[:, : images * side**2],
        )
        number += 1


def batches(model: DeepStackForConditionalGeneration, case: Case, count: int, smoke: bool) -> list[Any]:
    """Rows are filled in the order in which samples come: packed, or as many padded rows as fill as many positions."""
    capacity = 256 if smoke else 2048
    stream, per_view, found = samples(model, case, capacity), model.config.typed_vision().patches_per_side ** 2, []
    held: list[Sample] = []
    for _ in range(count):
        taken, room = held, case.rows * capacity - sum(len(s.input_ids) for s in held)
        while True:
            held = [next(stream)]
            if len(held[0].input_ids) > room:
                break
            taken, room = [*taken, held[0]], room - len(held[0].input_ids)
        rows: list[Any] = [taken] if case.packed else taken
        found.append(collate(rows, pad_id=0, side=PadSide.right, tokens_per_view=per_view))
    return found


def run(case: Case, device: torch.device, steps: int, smoke: bool) -> dict[str, Any]:
    """The numbers of one case; ``error`` where it could not run."""
    began = time.perf_counter()
    torch.manual_seed(0)
    model = model_of(case, device, smoke)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    counter, clock, warm = FlopsCounter(model), StepClock(), 3
    given = batches(model, case, warm + steps, smoke)
    seconds, flops, tokens, losses = [], 0.0, 0, []
    for number, batch in enumerate(given):
        if number == warm + steps - 1:
            clock.watch(model)
        if number == warm:
            _wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        clock.mark("start")
        batch = batch.to(device)
        total: Tensor = model(**batch.training_inputs(), use_cache=False).losses.sum()
        (total / len(batch.targets)).backward()
        clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("end")
        work = counter.of(batch)
        losses.append(total.detach() / len(batch.targets))
        if number >= warm:
            _wait(device)
            seconds.append(time.perf_counter() - start)
            flops, tokens = flops + work, tokens + sum(batch.lengths)
    peak = peak_of(device, half=True)
    found = {
        "tokens_per_second": tokens / sum(seconds),
        "padding": 1 - tokens / sum(batch.input_ids.numel() for batch in given[warm:]),
        "tflops_per_second": flops / sum(seconds) / 1e12,
        "mfu": None if peak is None else flops / sum(seconds) / peak,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "step_seconds": statistics.median(seconds),
        "split": clock.read(0.0),
        "losses": [float(loss) for loss in losses],
        "took": time.perf_counter() - began,
    }
    if not all(np.isfinite(found["losses"])):
        found["error"] = "a loss that is no number"
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tried(case: Case, device: torch.device, steps: int, smoke: bool) -> dict[str, Any]:
    try:
        return run(case, device, steps, smoke)
    except Exception as error:  # one row less, and the table says why
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0][:160] if lines else ''}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def row(case: Case, found: dict[str, Any]) -> str:
    words = [case.size, case.stage, "packed" if case.packed else "padded", "yes" if case.compiled else "no"]
    words += [case.checkpointing.name, str(case.rows)]
    if "error" in found:
        return "| " + " | ".join([*words, *["-"] * 5, found["error"]]) + " |"
    whole = sum(found["split"].values())
    split = ", ".join(
        f"{part} {found['split'][part] / whole:.0%}" for part in PARTS if found["split"][part] / whole >= 0.005
    )
    mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    gib = "-" if found["gib"] is None else f"{found['gib']:.1f}"
    numbers = [
        f"{found['tokens_per_second']:,.0f}",
        f"{found['padding']:.1%}",
        f"{found['tflops_per_second']:.3g}",
        mfu,
        gib,
    ]
    return "| " + " | ".join([*words, *numbers, split]) + " |"


_COLUMNS = ["LLM", "stage", "rows", "compiled", "checkpointing", "rows a forward"]
_COLUMNS += ["tokens/s", "padding", "model TFLOP/s", "MFU", "GiB", "a step"]
HEAD = "| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="measured steps of each case, after three")
    parser.add_argument("--minutes", type=float, default=8.5, help="no case is begun that may end later")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on whatever is there; no figures")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="where gpu.md and gpu.json go")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        raise SystemExit("No GPU here: this measures one. --smoke tries the code on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    end, lines, raw, took = time.perf_counter() + 60 * args.minutes, [], [], [0.0]
    text, about = "", f"{name}; {where()}{'; --smoke: tiny sizes, no figures' if args.smoke else ''}"
    for case in CASES[:3] + CASES[5:7] if args.smoke else CASES:
        start = time.perf_counter()
        if may_begin(end - start, took):
            found = tried(case, device, 1 if args.smoke else args.steps, args.smoke)
            took.append(time.perf_counter() - start)
        else:
            found = {"error": f"not begun: it might not have ended within {args.minutes:g} minutes"}
        lines.append(row(case, found))
        raw.append({"case": str(case), **found})
        print(lines[-1], flush=True)
        text = written(args.out, about, lines, raw)
    print("\n" + text)


def may_begin(left: float, took: list[float]) -> bool:
    """Whether a case fits into the seconds that are left: half as long again as the longest so far."""
    return left >= 1.5 * max(took)


def where() -> str:
    """Packages and commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    gone = f"; not installed: {', '.join(MISSING)}" if MISSING else ""
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    return f"{versions}; after commit {git.stdout.strip() or 'none'}{gone}"


def written(folder: Path, about: str, lines: list[str], raw: list[dict[str, Any]]) -> str:
    """The table so far: what comes next may be killed."""
    text = "\n\n".join(["# Training steps on one GPU", about, "\n".join([HEAD, *lines]), "Command: `make bench-gpu`."])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(text + "\n")
    (folder / "gpu.json").write_text(json.dumps(raw) + "\n")
    return text


if __name__ == "__main__":
    main()
