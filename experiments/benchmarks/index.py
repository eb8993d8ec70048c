"""How fast shards are indexed and opened, on one core: ``python experiments/benchmarks/index.py [FOLDER]``.

Writes a shard of 7,000 samples with JPEGs of 49 KB (the mean of LCS-558K) to FOLDER, default a temporary one, and
indexes it from the page cache: the archive is parsed strictly, and every byte goes through SHA-256, every member
through CRC-32, every record through the JSON parser, every image's header through the decoder. Then opens an index of
a million samples in fifty shards. Best and median of several repetitions; CPU time for the first, wall time for the
second.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from deepstack_pl.data.columns import Columns
from deepstack_pl.data.index import ShardIndex, build_index, sidecar
from deepstack_pl.data.json_file import JsonList
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.sources import ShardSource

REPETITIONS = 7
IMAGE_BYTES = 49_000
SAMPLES, SHARDS = 20_000, 50


def record(number: int) -> dict[str, object]:
    turns = [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
    ]
    return {"id": f"{number:09d}", "image": f"00453/{number:09d}.jpg", "conversations": turns}


def write(folder: Path) -> Path:
    """One shard; its images end in padding, which JPEG allows, so that they weigh what LCS's do."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize((336, 252)).save(buffer, "JPEG", quality=40)
    data = buffer.getvalue() + bytes(max(0, IMAGE_BYTES - len(buffer.getvalue())))
    with ShardWriter(folder, max_bytes=2**30) as writer:
        for number in range(7000):
            writer.write(record(number), [data])
    return folder / "shard-000000.tar"


def timed(run: Callable[[], object], clock: Callable[[], float]) -> tuple[float, float]:
    """Best and median seconds."""
    seconds = []
    for _ in range(REPETITIONS):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds), median(seconds)


def speed(size: int, best: float, middle: float) -> str:
    return f"{size / best / 1e6:.0f} MB/s (median {size / middle / 1e6:.0f})"


def million(folder: Path, one: ShardIndex) -> None:
    members = np.arange(2 * SAMPLES)
    many = replace(
        one,
        bytes=2 * SAMPLES * 1024,
        offset=members * 1024,
        size=np.full(2 * SAMPLES, 300),
        crc=np.zeros(2 * SAMPLES, np.uint32),
        extension=(members % 2).astype(np.uint16),
        width=np.full(2 * SAMPLES, 336, np.int32),
        height=np.full(2 * SAMPLES, 336, np.int32),
        first=np.arange(SAMPLES + 1) * 2,
        key_ends=np.arange(1, SAMPLES + 1) * 9,
        key_bytes=np.frombuffer(b"".join(b"%09d" % number for number in range(SAMPLES)), np.uint8),
        columns=Columns.plain(SAMPLES),
    )
    folder.mkdir()
    for number in range(SHARDS):
        tar = folder / f"shard-{number:06d}.tar"
        tar.touch()
        os.truncate(tar, many.bytes)
        replace(many, mtime_ns=tar.stat().st_mtime_ns).save(sidecar(tar))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        shard = write(folder / "train")
        size = shard.stat().st_size
        best, middle = timed(lambda: build_index(shard), time.process_time)
        print(f"index of {size / 1e6:.0f} MB, 7,000 samples: {speed(size, best, middle)}")
        listed = folder / "list.json"
        listed.write_text(json.dumps([record(number) for number in range(300_000)]))
        size = listed.stat().st_size
        best, middle = timed(lambda: sum(1 for _ in JsonList(listed)), time.process_time)
        print(f"JSON of {size / 1e6:.0f} MB, 300,000 records: {speed(size, best, middle)}")
        million(folder / "many", ShardIndex.load(sidecar(shard)))
        best, middle = timed(lambda: ShardSource(folder / "many"), time.perf_counter)
        print(f"opening {SAMPLES * SHARDS:,} samples in {SHARDS} shards: {best:.2f} s (median {middle:.2f})")


if __name__ == "__main__":
    main()
