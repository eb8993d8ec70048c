"""One LLaVA-format JSON file and a folder of images, and how it is parted in training and validation."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from deepstack_pl.batch import Record
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.index import header_size
from deepstack_pl.data.json_file import JsonList
from deepstack_pl.data.llava import check_turns, image_names, record_from_llava, source_of, text_length
from deepstack_pl.data.order import order
from deepstack_pl.data.progress import bar
from deepstack_pl.data.records import Outline
from deepstack_pl.vision.images import decode_image, image_size

HOLD_OUT_SEED = 0  # not the run's: every run of a comparison validates on the same records


class LlavaJsonSource:
    """A LLaVA-format JSON file: a list of ``{"id", "image": name or list of names, "conversations"}``.

    Everything that can be checked without decoding is checked at once: roles, placeholders, missing images.
    """

    def __init__(self, path: Path, images: Path | None, rows: Sequence[int] | None = None) -> None:
        self.path, self.images = path, images
        self._records: list[dict[str, Any]] = []
        self.names: list[list[str]] = []
        listed = JsonList(path)
        for row in listed:
            key = f"{path.name}:{row.number}"
            row.check(key)
            self._records.append(row.values)
            self.names.append(image_names(row.values, key))
            check_turns(row.values, len(self.names[-1]), key)
        self._file_sha256 = listed.sha256
        self.rows = range(len(self._records)) if rows is None else rows
        self._check_images()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._fingerprint: str | None = None

    def subset(self, rows: Sequence[int]) -> Self:
        """The same file, these rows alone."""
        chosen = copy.copy(self)
        chosen.rows, chosen._fingerprint, chosen._sizes = rows, None, {}
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Record:
        row, key = self.rows[index], self.key(index)
        files = [self._file(name) for name in self.names[row]]
        images = [decode_image(file.read_bytes(), f"{key}, {file}") for file in files]
        return record_from_llava(self._records[row], images, key, source_of(self._records[row]))

    def key(self, index: int, /) -> str:
        return f"{self.path.name}:{self.rows[index]}"

    def outline(self, index: int, /) -> Outline:
        row, key = self.rows[index], self.key(index)
        turns = check_turns(self._records[row], len(self.names[row]), key)
        sizes = (self._size(name, key) for name in self.names[row])
        return Outline(key, turns, tuple(sizes))

    def stored(self, index: int, /) -> tuple[bytes, list[bytes]]:
        row = self.rows[index]
        files = [self._file(name) for name in self.names[row]]
        return json.dumps(self._records[row]).encode(), [f.read_bytes() if f.is_file() else b"" for f in files]

    @property
    def columns(self) -> Columns:
        """Sizes of images are known once the fingerprint was asked for, which reads them; 0 of what is no picture."""
        _ = self.fingerprint
        records = [self._records[row] for row in self.rows]
        sources = [source_of(values) for values in records]
        places = {name: place for place, name in enumerate(dict.fromkeys(sources))}
        first = [next(iter(self.names[row]), None) for row in self.rows]
        sizes = np.array([(0, 0) if name is None else self._sizes[name] for name in first], np.int64).reshape(-1, 2)
        return Columns(
            images=np.array([len(self.names[row]) for row in self.rows], np.int64),
            text=np.array([text_length(values) for values in records], np.int64),
            width=sizes[:, 0],
            height=sizes[:, 1],
            source=np.array([places[name] for name in sources], np.int64),
            sources=tuple(places),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the JSON file's bytes, of which rows these are, and of the bytes of the images they name.

        The file is hashed as it was read; the images when this is first asked for, each in full, and not again: a
        second or two a gigabyte from a quick disk. `split_json` asks at once. Images of other rows, and dates, do not
        count.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(self._file_sha256.encode())
            digest.update(json.dumps(list(self.rows)).encode())
            names = sorted({name for row in self.rows for name in self.names[row]})
            with bar(f"Reading the images of {self.path.name}", len(names)) as advance:
                for name in names:
                    data = self._file(name).read_bytes()
                    digest.update(f"\n{name} {hashlib.sha256(data).hexdigest()}".encode())
                    self._sizes[name] = header_size(data)
                    advance(1)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def parts(self) -> dict[str, str]:
        return {self.path.name: self.fingerprint[:16]}

    def describe(self) -> str:
        text_only = sum(not self.names[row] for row in self.rows)
        return f"{len(self):,} of {len(self._records):,} records of {self.path}, {text_only:,} without an image"

    def _file(self, name: str) -> Path:
        assert self.images is not None
        return self.images / name

    def _size(self, name: str, key: str) -> tuple[int, int]:
        """Width and height from the image's header."""
        size = self._sizes.get(name, (0, 0))
        return size if size[0] else image_size(self._file(name).read_bytes(), f"{key}, {name}")

    def _check_images(self) -> None:
        """Images are looked up once, now, and not after three hours."""
        wanted = {name: row for row, names in enumerate(self.names) for name in names}
        if wanted and self.images is None:
            raise ValueError(f"{self.path}: its records name images. Say data.images=FOLDER where their paths start.")
        if self.images is not None and not self.images.is_dir():
            raise ValueError(f"data.images={self.images} is no folder. Name the one that the image paths start from.")
        missing = [name for name in wanted if not self._file(name).is_file()]
        if missing:
            first = ", ".join(f"{name} (record {wanted[name]})" for name in missing[:3])
            raise ValueError(
                f"{len(missing)} of {len(wanted)} images of {self.path} are not under {self.images}: {first}"
                f"{', ...' if len(missing) > 3 else ''}. Fetch them, correct data.images, or take the records out."
            )


def split_json(config: DataConfig) -> tuple[LlavaJsonSource, LlavaJsonSource]:
    """Training and validation rows of ``config.path``; see `hold_out`. Their images are hashed now, before a run."""
    if config.path is None:
        raise ValueError("data.source=llava_json reads one file: say data.path=FILE.json data.images=FOLDER.")
    source = LlavaJsonSource(Path(config.path), Path(config.images) if config.images else None)
    train, val = split_rows(source.names, config.val_samples, source.path)
    parts = source.subset(train), source.subset(val)
    for part in parts:
        _ = part.fingerprint  # of the images that the run starts from, not of those at its first checkpoint
    return parts


def split_rows(names: Sequence[Sequence[str]], val_samples: int, path: Path) -> tuple[list[int], list[int]]:
    """Training and validation rows of the file ``path``, whose records name these images.

    Raises:
        ValueError: they cannot be parted.
    """
    if len(names) < 2:
        raise ValueError(f"data.path={path} holds one record; training and validation need one each. Add more.")
    if val_samples < 1:
        raise ValueError(f"data.val_samples={val_samples}: validation needs at least one record.")
    groups = sharing_groups(names)
    if len(groups) < 2:
        raise ValueError(
            f"data.path={path}: its {len(names)} records all hang together by the images they share, and no "
            "image may be in training and in validation. Add records about other images."
        )
    return hold_out(groups, val_samples)


def sharing_groups(names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows that hang together by the names of their images, also through other rows; a row without any is alone."""
    parent = list(range(len(names)))

    def first_of(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    seen: dict[str, int] = {}
    for row, used in enumerate(names):
        for name in used:
            one, other = sorted((first_of(row), first_of(seen.setdefault(name, row))))
            parent[other] = one
    groups: dict[int, list[int]] = {}
    for row in range(len(names)):
        groups.setdefault(first_of(row), []).append(row)
    return list(groups.values())


def hold_out(groups: Sequence[list[int]], val_samples: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation, each group whole in one of them, by a fixed seed.

    Validation is given groups in drawn order as long as they fit in ``val_samples`` rows, or in a fifth of them all
    where there are not twice as many: never more, and fewer where what is left does not fit. Where no group fits it is
    given the smallest.
    """
    assert len(groups) >= 2
    count = sum(len(group) for group in groups)
    wanted = val_samples if count >= 2 * val_samples else max(1, count // 5)
    drawn = [groups[number] for number in order(len(groups), HOLD_OUT_SEED, 0)]
    val: list[int] = []
    for group in drawn:
        if len(val) + len(group) <= wanted:
            val += group
    val = sorted(val or min(drawn, key=len))
    held = set(val)
    return [row for row in range(count) if row not in held], val
