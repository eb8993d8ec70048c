"""A source without files, for tests of the stream: records that are their own number."""

from dataclasses import dataclass, field

import numpy as np
import torch

from deepstack_pl.batch import MultimodalBatch, PadSide, Reason, Record, Refused, Sample, collate
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.records import Outline


@dataclass
class Numbers:
    """``count`` records; those in ``bad`` are refused."""

    count: int = 10
    fingerprint: str = "numbers"
    bad: tuple[int, ...] = ()
    name: str = ""
    columns: Columns = field(init=False)

    def __post_init__(self) -> None:
        self.columns = Columns.plain(self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Record:
        if index in self.bad:
            raise Refused(Reason.image, f"{self.key(index)}: no picture.")
        return Record(key=self.key(index), turns=(), images=(), source=self.name)

    def key(self, index: int, /) -> str:
        return f"{self.name}{index}"

    def outline(self, index: int, /) -> Outline:
        if index in self.bad:
            raise Refused(Reason.image, f"{self.key(index)}: no picture.")
        return Outline(self.key(index), (), ())

    def stored(self, index: int, /) -> tuple[bytes, list[bytes]]:
        return f"{self.name}{index}".encode(), []

    def parts(self) -> dict[str, str]:
        return {"numbers": self.fingerprint}

    def describe(self) -> str:
        return f"{self.count} numbers"


def mixed(images: int, texts: int, seed: int = 0) -> Numbers:
    """``images`` records with an image, then ``texts`` without; texts of many lengths."""
    source = Numbers(images + texts)
    plain = source.columns
    characters = np.random.default_rng(seed).integers(1, 1000, len(source))
    source.columns = Columns(
        images=np.repeat([1, 0], [images, texts]),
        text=characters,
        width=plain.width,
        height=plain.height,
        source=plain.source,
        sources=plain.sources,
    )
    return source


def sample(key: str, value: int, length: int = 1) -> Sample:
    """``length`` positions of ``value``, without an image."""
    none = torch.empty(0, dtype=torch.long)
    return Sample(
        key=key,
        input_ids=torch.full((length,), value),
        labels=torch.zeros(length, dtype=torch.long),
        views=torch.empty(0, 3, 8, 8, dtype=torch.uint8),
        images=0,
        token_index=torch.full((length,), -1),
        sequence_rows=none,
        group_rows=none[None, :][:0],
        vit_rows=none[None, :][:0],
    )


def prepare(record: Record) -> Sample:
    return sample(record.key, int(record.key))


def blank(key: str = "", source: str = "", refused: tuple[Reason, str] | None = None) -> Sample:
    empty = sample(key, -1)
    empty.source, empty.refused = source, refused
    return empty


def together(rows: list) -> MultimodalBatch:
    return collate(rows, pad_id=0, side=PadSide.right, tokens_per_view=4)
