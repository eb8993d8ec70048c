"""A corpus as it was downloaded, looked through before anything is built: which records can be taken, which not, why.

Nothing is decoded here: records are parsed and checked, and the images they name are looked up.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.data.config import DataConfig, Source
from deepstack_pl.data.json_file import JsonList, Row
from deepstack_pl.data.llava import PLACEHOLDER, TEXT, check_turns, image_names, source_of
from deepstack_pl.data.llava_json import split_rows
from deepstack_pl.data.progress import bar
from deepstack_pl.data.shards import stored_bytes

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
SPLITS = ("train", "val")


class CorpusFiles(NamedTuple):
    """The record file and the folder that its image paths start from."""

    name: str
    json: Path
    images: Path | None


class LeftOut(NamedTuple):
    """A record that is not taken."""

    row: int
    id: str
    image: str
    reason: str
    sentence: str


class Found(NamedTuple):
    """A record that can be taken, if its images can be decoded.

    Attributes:
        start: of its own bytes in the JSON file; ``size`` is how many.
        images: each with its size and date of change.
    """

    row: int
    start: int
    size: int
    id: str
    images: tuple[tuple[str, int, int], ...]
    source: str

    @property
    def stored(self) -> int:
        """Bytes it takes in a shard."""
        return stored_bytes([self.size, *(size for _, size, _ in self.images)])


@dataclass(slots=True)
class Survey:
    """All records of a corpus.

    Attributes:
        records: how many there are; ``sources`` counts them by source.
        text_only: how many name no image.
        found: those that can be taken, by split, in the order of the file.
        repeated: how many ask several times for their one image.
        leading: how many start with an answer, which is dropped.
        trailing: how many end with a question, which is dropped.
    """

    sha256: str = ""
    records: int = 0
    text_only: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Found]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    repeated: int = 0
    leading: int = 0
    trailing: int = 0


def corpus_files(config: DataConfig) -> CorpusFiles:
    """Where the corpus that ``config`` names lies.

    Raises:
        ValueError: it names none, or the files are not there.
    """
    if config.source not in (Source.corpus, Source.llava_json):
        raise ValueError(
            f"data.source={config.source.name}: shards are built of LLaVA-format JSON files. Say data=lcs558k, "
            "sharegpt4v_pt, sharegpt4v_sft or llava665k with data.root=FOLDER, or data=llava_json with "
            "data.path=FILE.json data.images=FOLDER."
        )
    if config.path is None:
        raise ValueError("data.path is not given. Say data.path=FILE.json, and data.images=FOLDER.")
    at = Path(config.root) if config.source is Source.corpus else Path()
    images = None if config.images is None else at / config.images
    if images is not None and not images.is_dir():
        raise ValueError(f"data.images: {images} is no folder. Name the one that the image paths start from.")
    name = config.name if config.source is Source.corpus else Path(config.path).stem
    return CorpusFiles(name, at / config.path, images)


def survey(files: CorpusFiles, val_samples: int) -> Survey:
    """Look through a corpus.

    Validation is drawn from all records of the file, also those that cannot be taken: the same images are held out
    whatever is missing on this machine.

    Raises:
        ValueError: the JSON file is none, or cannot be parted in training and validation.
    """
    seen, listed = Survey(), JsonList(files.json)
    lookup = _Lookup(files)
    names: list[Sequence[str]] = []
    found: list[Found] = []
    with bar(f"Reading {files.json.name}", listed.size, in_bytes=True) as advance:
        for row in listed:
            names.append(())
            source = source_of(row.values)
            seen.text_only += source == TEXT
            source = source or files.name
            seen.sources[source] += 1
            try:
                key = f"{files.json.name}:{row.number}"
                row.check(key)
                named = image_names(row.values, key)
                names[-1] = named
                check_turns(row.values, len(named), key)
                images = tuple(lookup.find(name, key) for name in named)
            except Refused as refused:
                seen.left_out.append(left_out(row.number, row.values, refused))
            else:
                found.append(Found(row.number, row.start, row.size, _id(row.values), images, source))
                _count_mended(seen, row, len(named))
            advance(row.size)
    seen.sha256, seen.records = listed.sha256, len(names)
    held_out = set(split_rows(names, val_samples, files.json)[1])
    seen.found = {
        "train": [record for record in found if record.row not in held_out],
        "val": [record for record in found if record.row in held_out],
    }
    return seen


def left_out(row: int, values: Any, refused: Refused) -> LeftOut:
    """The line of a record that is refused."""
    image = values.get("image", "") if isinstance(values, dict) else ""
    return LeftOut(row, _id(values), str(image)[:500], refused.reason.name, refused.sentence)


def _id(values: Any) -> str:
    return str(values.get("id", ""))[:200] if isinstance(values, dict) else ""


def _count_mended(seen: Survey, row: Row, images: int) -> None:
    """Count what `check_turns` puts right as published."""
    turns = row.values["conversations"]
    seen.leading += turns[0]["from"] == "gpt"
    seen.trailing += turns[-1]["from"] == "human"
    seen.repeated += sum(turn["value"].count(PLACEHOLDER) for turn in turns) > images


class _Lookup:
    """Images by name, each looked up once."""

    def __init__(self, files: CorpusFiles) -> None:
        self.files = files
        self._known: dict[str, tuple[str, int, int] | None] = {}

    def find(self, name: str, key: str) -> tuple[str, int, int]:
        if self.files.images is None:
            raise ValueError(f"{self.files.json}: its records name images. Say data.images=FOLDER.")
        if name not in self._known:
            self._known[name] = _stat(self.files.images, name)
        known = self._known[name]
        if known is None:
            raise Refused(
                Reason.missing,
                f"{key}: image {name} is not under {self.files.images}. Fetch it, or leave its record out.",
            )
        return known


def _stat(images: Path, name: str) -> tuple[str, int, int] | None:
    try:
        there = os.stat(images / name)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return (name, there.st_size, there.st_mtime_ns) if stat.S_ISREG(there.st_mode) else None
