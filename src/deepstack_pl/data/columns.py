"""What is known of every sample without reading it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Int64
from numpy import ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """One row per sample.

    Attributes:
        images: how many images.
        text: characters of all its turns.
        width: of the first image in pixels; 0 without one, and where it is no picture.
        height: of the same.
        source: place in ``sources`` of the part of the corpus it belongs to.
    """

    images: Int64[ndarray, " n"]
    text: Int64[ndarray, " n"]
    width: Int64[ndarray, " n"]
    height: Int64[ndarray, " n"]
    source: Int64[ndarray, " n"]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def concatenate(cls, parts: Sequence["Columns"]) -> Self:
        """The rows of all ``parts``, sources of one name put together."""
        sources = tuple(dict.fromkeys(name for part in parts for name in part.sources))
        places = [np.array([sources.index(name) for name in part.sources], np.int64) for part in parts]
        moved = [place[part.source] for place, part in zip(places, parts, strict=True)]
        empty = np.zeros(0, np.int64)
        rows = {name: np.concatenate([empty, *(getattr(part, name) for part in parts)]) for name in ROWS[:-1]}
        return cls(**rows, source=np.concatenate([empty, *moved]), sources=sources)

    def take(self, rows: Int64[ndarray, " m"]) -> "Columns":
        """These rows, in this order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ROWS})

    @classmethod
    def plain(cls, n: int) -> Self:
        """``n`` samples of one character and no image, of one source without a name."""
        zeros = np.zeros(n, np.int64)
        return cls(zeros, np.ones(n, np.int64), zeros, zeros, zeros, ("",))


ROWS = ("images", "text", "width", "height", "source")  # the arrays
