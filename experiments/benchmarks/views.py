"""Preprocessing of one image, on one core: the published path against ours.

From the bytes of a 640 x 480 JPEG to a global view and four tiles of 336 pixels. The published path (LLaVA's, as
DeepStack's ``process_anyres_image`` has it): Pillow decodes and resizes, Hugging Face's ``CLIPImageProcessorPil`` (by
name: which class ``AutoImageProcessor`` takes depends on what is installed) normalises view by view in float32. Ours:
uint8, as a DataLoader's worker hands it on; it is normalised on the model's device. Paths take turns, one image each,
so that whatever else the machine does meets all of them; ratios are those of one run. Every path is run on the same
images, and that they agree is checked before anything is timed.

    python experiments/benchmarks/views.py [--repetitions 100] [--out FOLDER]

prints a table, and writes it to ``views.md`` and every single time to ``views.json``.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy are imported

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import ViewsBackend, VisionConfig
from deepstack_pl.vision.images import decode_image
from deepstack_pl.vision.views import normalise, views_of

VISION = VisionConfig(name="clip_vit_l_336")
PLAN = Plan.build(ModelConfig(name="deepstack_l"), llm_layers=32, vit_layers=VISION.tap)
SIZE, GRID = VISION.image_size, (2, 2)
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
IMAGES = 8
TARGETS = {"pil": 1.6, "torch": 5.0}
PACKAGES = ("pillow", "simplejpeg", "numpy", "torch", "transformers")


def photo(seed: int) -> bytes:
    """A 640 x 480 JPEG with detail at every scale, quality 90, 4:2:0."""
    rng = np.random.default_rng(seed)
    page = np.zeros((480, 640, 3))
    for cell, strength in ((160, 60), (40, 40), (10, 25), (2, 24)):
        noise = rng.normal(0, 1, (480 // cell, 640 // cell, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((640, 480), Image.Resampling.BICUBIC) for c in range(3)]
        page += strength * np.stack([np.asarray(layer) for layer in layers], axis=-1)
    file = BytesIO()
    Image.fromarray((page + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def published(data: bytes) -> Tensor:
    """Float32 views, [5, 3, 336, 336]."""
    image = Image.open(BytesIO(data)).convert("RGB")
    enlarged = image.resize((GRID[0] * SIZE, GRID[1] * SIZE))
    views = [image.resize((SIZE, SIZE))]
    for y in range(0, enlarged.height, SIZE):
        views += [enlarged.crop((x, y, x + SIZE, y + SIZE)) for x in range(0, enlarged.width, SIZE)]
    return torch.stack([PROCESSOR.preprocess(view, return_tensors="pt")["pixel_values"][0] for view in views])


def ours(backend: ViewsBackend) -> Callable[[bytes], Tensor]:
    """Uint8 views, [5, 3, 336, 336]."""
    return lambda data: views_of(decode_image(data, "image"), PLAN, VISION, backend)[0]


PATHS: dict[str, Callable[[bytes], Tensor]] = {
    "published": published,
    "pil": ours(ViewsBackend.pil),
    "torch": ours(ViewsBackend.torch),
}


def differences(files: list[bytes]) -> dict[str, str]:
    """How far each path's views are from the published ones."""
    found = {"published": "-"}
    off, most, values = 0, 0, 0
    for data in files:
        pil, fast = PATHS["pil"](data), PATHS["torch"](data)
        apart = (normalise(pil, VISION) - published(data)).abs().max()
        if apart > 1e-6:
            raise SystemExit(f"backend pil is {float(apart):.1e} from the published views, not within rounding.")
        levels = (pil.int() - fast.int()).abs()
        off, most, values = off + int((levels > 0).sum()), max(most, int(levels.max())), values + levels.numel()
    found["pil"] = "equal, but for float32 rounding"
    found["torch"] = f"at most {most} levels, at {off / values:.2%} of values"
    return found


def measure(files: list[bytes], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time an image, for each path; paths take turns."""
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    for turn in range(-IMAGES, repetitions):
        for name, path in PATHS.items():
            data = files[turn % IMAGES]
            start = time.process_time()
            path(data)
            if turn >= 0:  # before that: warming up
                times[name].append((time.process_time() - start) * 1000)
    return times


def table(times: dict[str, list[float]], apart: dict[str, str]) -> str:
    lines = [
        "| path | min ms | median ms | images/s | times as fast: min / median | target | from the published pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    base = times["published"]
    for name, own in times.items():
        low, middle = min(own), statistics.median(own)
        faster = f"{min(base) / low:.2f} / {statistics.median(base) / middle:.2f}"
        target = f"{TARGETS[name]:.1f}" if name in TARGETS else "-"
        lines.append(
            f"| {name} | {low:.2f} | {middle:.2f} | {1000 / middle:.0f} | {faster} | {target} | {apart[name]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=100, metavar="N", help="times each path runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="where results go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [photo(seed) for seed in range(IMAGES)]
    apart = differences(files)
    times = measure(files, args.repetitions)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    simd = torch.backends.cpu.get_cpu_capability()
    size = sum(map(len, files)) / IMAGES / 1000
    text = "\n\n".join(
        (
            "# Preprocessing on one core",
            f"640 x 480 JPEG ({size:.0f} KB) to 336 + 4 x 336; CPU time of one thread, paths in turns, "
            f"{args.repetitions} images each. The published path normalises as well, in float32; ours hand on uint8, "
            "which is normalised on the model's device. `experiments/benchmarks/views.py` says more of the paths.",
            table(times, apart),
            f"Command: `python experiments/benchmarks/views.py --repetitions {args.repetitions}`. {versions}, Python "
            f"{platform.python_version()}, {platform.machine()} with {simd} (the torch backend needs AVX2 to be fast). "
            "Single times: `views.json`.",
        )
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "views.md").write_text(text + "\n")
    rounded = {name: [round(t, 3) for t in own] for name, own in times.items()}
    (args.out / "views.json").write_text(json.dumps(rounded) + "\n")
    print(text)


if __name__ == "__main__":
    main()
