"""One LLaVA-format JSON file and a folder of images, and how it is parted in training and validation."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

from deepstack_pl.batch import Record
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.images import decode_image
from deepstack_pl.data.llava import check_turns, record_from_llava
from deepstack_pl.data.shards import file_sha256
from deepstack_pl.data.stream import order

HOLD_OUT_SEED = 0  # not the run's: every run of a comparison validates on the same records


class LlavaJsonSource:
    """A LLaVA-format JSON file: a list of ``{"id", "image": name or list of names, "conversations"}``.

    Everything that can be checked without decoding is checked at once: roles, placeholders, missing images.
    """

    def __init__(self, path: Path, images: Path | None, rows: Sequence[int] | None = None) -> None:
        self.path, self.images = path, images
        self._records, self._file_sha256 = _read_list(path)
        self.names = [_image_names(values, f"{path.name}:{row}") for row, values in enumerate(self._records)]
        self.rows = range(len(self._records)) if rows is None else rows
        for row, (values, names) in enumerate(zip(self._records, self.names, strict=True)):
            check_turns(values, len(names), f"{path.name}:{row}")
        self._check_images()
        self._fingerprint: str | None = None

    def subset(self, rows: Sequence[int]) -> Self:
        """The same file, these rows alone."""
        chosen = copy.copy(self)
        chosen.rows, chosen._fingerprint = rows, None
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Record:
        row = self.rows[index]
        key = f"{self.path.name}:{row}"
        files = [self._file(name) for name in self.names[row]]
        return record_from_llava(
            self._records[row], [decode_image(file.read_bytes(), f"{key}, {file}") for file in files], key
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
            for name in sorted({name for row in self.rows for name in self.names[row]}):
                digest.update(f"\n{name} {file_sha256(self._file(name))}".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> str:
        text_only = sum(not self.names[row] for row in self.rows)
        return f"{len(self):,} of {len(self._records):,} records of {self.path}, {text_only:,} without an image"

    def _file(self, name: str) -> Path:
        assert self.images is not None
        return self.images / name

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
    if len(source) < 2:
        raise ValueError(f"data.path={config.path} holds one record; training and validation need one each. Add more.")
    if config.val_samples < 1:
        raise ValueError(f"data.val_samples={config.val_samples}: validation needs at least one record.")
    groups = sharing_groups(source.names)
    if len(groups) < 2:
        raise ValueError(
            f"data.path={config.path}: its {len(source)} records all hang together by the images they share, and no "
            "image may be in training and in validation. Add records about other images."
        )
    train, val = hold_out(groups, config.val_samples)
    parts = source.subset(train), source.subset(val)
    for part in parts:
        _ = part.fingerprint  # of the images that the run starts from, not of those at its first checkpoint
    return parts


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


def _read_list(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records, and the SHA-256 of the bytes that they were read from."""
    if not path.is_file():
        raise ValueError(f"data.path={path} is not there. Name a JSON file in LLaVA's format.")
    data = path.read_bytes()
    try:
        records = json.loads(data)
    except ValueError as error:
        raise ValueError(f"data.path={path} is no JSON ({error}). LLaVA's format is one list of records.") from error
    if not isinstance(records, list) or not records or not all(isinstance(values, dict) for values in records):
        raise ValueError(
            f"data.path={path} is not a list of records, at least one. LLaVA's format is "
            '[{"id": ..., "image": ..., "conversations": [...]}, ...].'
        )
    return records, hashlib.sha256(data).hexdigest()


def _image_names(values: dict[str, Any], key: str) -> list[str]:
    """The images that a record names, each written one way; a record without any is text-only."""
    names = values.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key}: image is {values['image']!r}. Give a file name, or a list of them.")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{key}: image {name} leaves the image folder. Name images relative to data.images.")
    return [str(PurePosixPath(name)) for name in names]
