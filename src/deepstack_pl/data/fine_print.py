"""The fine print set: quilts whose colours every view shows and whose weaves only the enlarged image does.

A page asks for *coarse* facts, the swatches' colours, and for *fine* ones, their weaves (`loom` says why the global
view cannot hold these). Both are answered by transcription in reading order. Written once, as WebDataset shards in
LLaVA's conversation format, under a folder named from the values.

Training pages are one conversation that asks for both, in an order drawn by seed. Validation pages are two samples
each, coarse then fine, so that any even number of samples from the start holds as many of one as of the other.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepstack_pl.data.config import FinePrintConfig
from deepstack_pl.data.loom import COLOURS, WEAVES, Loom, Page
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shards import MANIFEST, ShardWriter, read_manifest, write_json

__all__ = [
    "COARSE_QUESTION",
    "COLOURS",
    "FINE_QUESTION",
    "WEAVES",
    "draw_page",
    "fine_print_folder",
    "write_fine_print",
]

COARSE_QUESTION = "Name the colours in reading order."
FINE_QUESTION = "Name the weaves in reading order."
SPLITS = ("train", "val")
SHARD_SAMPLES = 1024
VERSION = 1  # of what is drawn and written from the same values


def draw_page(loom: Loom, split: str, number: int) -> Page:
    """Page ``number`` of a split: a function of the seed and these two alone."""
    key = hashlib.sha256(f"{VERSION} {loom.config.seed} {split} {number}".encode()).digest()
    return loom.page(np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8"))))


def fine_print_folder(config: FinePrintConfig, root: Path) -> Path:
    """Where the set of these values lies."""
    values = json.dumps([VERSION, asdict(config)], sort_keys=True)
    return root / f"fine_print-{hashlib.sha256(values.encode()).hexdigest()[:10]}"


def write_fine_print(config: FinePrintConfig, root: Path) -> Path:
    """Write the set under ``root`` where it is not there yet, and return its folder.

    It is written beside its place and moved there when whole, so that an interruption leaves nothing that looks like
    a set, and two runs that start together do not meet.
    """
    folder = fine_print_folder(config, root)
    if folder.exists():
        _check_whole(folder)
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=root) as temporary:
        building = Path(temporary) / folder.name
        _write(config, building)
        try:
            os.replace(building, folder)
        except OSError:
            if not folder.exists():
                raise
            _check_whole(folder)  # another run was quicker
    return folder


def _write(config: FinePrintConfig, folder: Path) -> None:
    pages = dict(zip(SPLITS, (config.train_pages, config.val_pages), strict=True))
    manifest: dict[str, Any] = {"name": "fine_print", "version": VERSION, "values": asdict(config), "splits": {}}
    loom = Loom(config)
    with bar("Writing the fine print set", sum(pages.values())) as advance:
        for split, count in pages.items():
            with ShardWriter(folder / split, max_samples=SHARD_SAMPLES) as writer:
                for number in range(count):
                    page = draw_page(loom, split, number)
                    image = _png(page)
                    for record in _records(config, page, split, number):
                        writer.write(record, [image])
                    advance(1)
            shards = [{**asdict(shard), "name": f"{split}/{shard.name}"} for shard in writer.shards]
            samples = sum(shard.samples for shard in writer.shards)
            manifest["splits"][split] = {"pages": count, "samples": samples, "shards": shards}
    write_json(folder / MANIFEST, manifest)


def _records(config: FinePrintConfig, page: Page, split: str, number: int) -> Iterator[dict[str, Any]]:
    """The page's samples in LLaVA's format; ``kind`` and ``facts`` are those of the last answer."""
    name = f"{split}-{number:06d}"
    colours, weaves = list(COLOURS), WEAVES
    asked = {
        "coarse": (COARSE_QUESTION, [colours[i] for i in page.colours.flat]),
        "fine": (FINE_QUESTION, [weaves[i] for i in page.weaves.flat]),
    }
    if split == "train":
        fine_first = hashlib.sha256(f"order {config.seed} {number}".encode()).digest()[0] % 2
        kinds = [["fine", "coarse"] if fine_first else ["coarse", "fine"]]
    else:
        kinds = [["coarse"], ["fine"]]
    for together in kinds:
        turns = []
        for kind in together:
            question, facts = asked[kind]
            turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": " ".join(facts)})
        last = together[-1]
        yield {
            "id": name if len(kinds) == 1 else f"{name}-{last}",
            "image": f"{name}.png",
            "conversations": turns,
            "kind": last,
            "facts": asked[last][1],
        }


def _png(page: Page) -> bytes:
    buffer = BytesIO()
    Image.fromarray(page.pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_whole(folder: Path) -> None:
    whole = (folder / MANIFEST).exists() and all(read_manifest(folder / split) is not None for split in SPLITS)
    if not whole:
        raise ValueError(f"{folder} has lost its {MANIFEST}. Remove the folder, and it is written again.")
