"""How long a stream of a million samples takes to open and to go on with: ``python experiments/benchmarks/stream.py``.

Opens a stream of a million samples under each batching and shuffle, at its beginning and in the middle of an epoch (one
process, one thread, lengths known), and plans windows of 4,096 samples. Then says how full packed rows are on lengths
like those of LLaVA-1.5's 665,298 fine-tuning samples under DeepStack-L, 576 positions an image. Those are made up:
the sources' numbers are published, and text is log-normal about 40 + the means below, of which no count was at hand.
Best and median of several repetitions, CPU time; the table is written beside this file, as stream.md.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.data.batching import bins
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import Batching, DataConfig, Shuffle
from deepstack_pl.data.order import shuffled
from deepstack_pl.data.packing import packs
from deepstack_pl.data.stream import Position, Stream

N, WINDOW, CAPACITY = 1_000_000, 4096, 2048
# Samples, positions of images, mean positions of text: COCO, GQA, OCR-VQA, TextVQA, Visual Genome, text alone.
SOURCES = (
    (364_100, 576, 210),
    (72_140, 576, 120),
    (80_000, 576, 130),
    (21_953, 576, 90),
    (86_417, 576, 140),
    (40_688, 0, 900),
)


class Million:
    """A source of numbers; nothing of it is read."""

    fingerprint = "million"

    def __init__(self, n: int) -> None:
        images = (np.arange(n) % 16 > 0).astype(np.int64)
        plain = Columns.plain(n)
        self.columns = replace(plain, images=images, text=np.arange(n) * 7919 % 2003)

    def __len__(self) -> int:
        return len(self.columns)

    def key(self, index: int, /) -> str:
        return str(index)

    def describe(self) -> str:
        return f"{len(self):,} numbers"


def timed(run: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Best and median CPU seconds."""
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds), median(seconds)


def lengths_like_665k() -> Int[ndarray, " n"]:
    """Positions of each sample before it is cut, in the order of the sources."""
    draw = np.random.default_rng(0)
    parts = []
    for count, image, text in SOURCES:
        spread = 0.9 if not image else 0.6
        drawn = draw.lognormal(np.log(text) - spread**2 / 2, spread, count)
        parts.append(image + 40 + drawn.astype(np.int64))
    return np.concatenate(parts)


def seeks(repetitions: int) -> Iterator[str]:
    source = Million(N)
    lengths = np.random.default_rng(0).integers(600, 1200, N)
    yield f"| {N:,} samples | open and first batch, ms | open and a batch in the middle, ms |"
    yield "|---|---|---|"
    for batching in Batching:
        for shuffle in Shuffle:
            config = DataConfig(name="million", batch_size=128, batching=batching, shuffle=shuffle, window=WINDOW)
            middle = Position(step=1, epoch=3, window=120, unit=7)
            if batching in (Batching.samples, Batching.modality_length):
                middle = Position(step=1, epoch=3, unit=500_000)

            def first(start: Position, config: DataConfig = config) -> object:
                stream = Stream(source, config, 0, lengths=lengths, capacity=CAPACITY)  # type: ignore[arg-type]
                return next(stream.batches(start))

            found = [timed(lambda start=start: first(start), repetitions) for start in (Position(), middle)]
            yield (
                f"| {batching.name}, {shuffle.name} | "
                + " | ".join(f"{1e3 * best:.0f} ({1e3 * middling:.0f})" for best, middling in found)
                + " |"
            )


def windows(repetitions: int) -> Iterator[str]:
    lengths = np.clip(lengths_like_665k(), 1, CAPACITY)
    lengths = lengths[shuffled(len(lengths), "window")][:WINDOW]
    numbers = np.arange(WINDOW)
    yield f"| a window of {WINDOW:,} samples | ms |"
    yield "|---|---|"
    for name, plan in (
        ("token_budget of 16,384", lambda: bins(numbers, lengths, 16_384)),
        (f"packed into {CAPACITY:,}", lambda: packs(numbers, lengths, CAPACITY)),
    ):
        best, middling = timed(plan, repetitions)
        yield f"| {name} | {1e3 * best:.1f} ({1e3 * middling:.1f}) |"


def fills() -> Iterator[str]:
    everything = lengths_like_665k()
    everything = everything[shuffled(len(everything), "fill")]
    yield "| packed rows, windows of 4,096 | positions a sample | samples a row | full | least rows by volume: full |"
    yield "|---|---|---|---|---|"
    for what, shorter in (("576 an image", 0), ("144 an image (pooled)", 432)):
        for capacity in (2048, 4096, 8192):
            cut = everything - np.where(everything > 576, shorter, 0) if shorter else everything
            lengths = np.clip(cut, 1, capacity)
            parts = [lengths[start : start + WINDOW] for start in range(0, len(lengths), WINDOW)]
            rows = sum(len(packs(np.arange(len(part)), part, capacity)) for part in parts)
            volume = sum(-(-int(part.sum()) // capacity) for part in parts)
            yield (
                f"| {what}, rows of {capacity:,} | {lengths.mean():.0f} | {len(lengths) / rows:.2f} | "
                f"{lengths.sum() / (rows * capacity):.1%} | {lengths.sum() / (volume * capacity):.1%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    lines = ["# The stream", "", "CPU time of one thread, best of several repetitions (median).", ""]
    for part in (seeks(repetitions), windows(repetitions * 4), fills()):
        for line in part:
            print(line)
            lines.append(line)
        lines.append("")
    lines.append(
        f"Command: `python experiments/benchmarks/stream.py --repetitions {repetitions}`. numpy {np.__version__}, "
        f"Python {platform.python_version()}. The lengths are made up, see the program's first lines."
    )
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
