"""What every source of records gives: see `sources`."""

from typing import NamedTuple, Protocol

from deepstack_pl.batch import Record, Turn
from deepstack_pl.data.columns import Columns


class Outline(NamedTuple):
    """What decides how long a sample becomes: its turns, and width and height of its images."""

    key: str
    turns: tuple[Turn, ...]
    sizes: tuple[tuple[int, int], ...]


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """The record.

        Raises:
            Refused: it cannot be trained on.
            ValueError, OSError: its files are not what they were.
        """
        ...

    def key(self, index: int, /) -> str:
        """The record's name in messages, without reading it."""
        ...

    def outline(self, index: int, /) -> Outline:
        """The record without its images' pixels.

        Raises:
            Refused: it cannot be trained on.
        """
        ...

    def stored(self, index: int, /) -> tuple[bytes, list[bytes]]:
        """The record's own JSON and its images' bytes, undecoded and unchecked; b"" for an image that is not there."""
        ...

    @property
    def columns(self) -> Columns:
        """What is known of every record without reading it."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are made from."""
        ...

    def parts(self) -> dict[str, str]:
        """A digest of each file that the records are made from, by name: what to name when the fingerprint differs."""
        ...

    def describe(self) -> str:
        """One line for the log."""
        ...
