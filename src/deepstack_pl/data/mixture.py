"""Several sets of shards as one source: repeats or weights, and a part of each where a part is asked for."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.batch import Record
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.config import DataConfig, MixtureEntry
from deepstack_pl.data.folders import open_folder
from deepstack_pl.data.order import shuffled
from deepstack_pl.data.records import Outline, Source
from deepstack_pl.data.sources import ShardSource
from deepstack_pl.data.whole_set import check_set

MIXTURE_VERSION = 1  # of what is taken and drawn


class Mixture:
    """The samples that are taken of several sources, numbered one source after the other.

    Where there are several entries, keys and records' sources begin with the entry's name.

    With repeats an epoch holds each taken sample so many times. With weights it holds as many samples as were taken in
    all, shared out by weight to the nearest whole sample: as many whole passes over a source as fit, and of one pass a
    part that is drawn by seed and epoch.

    Attributes:
        epoch_samples: how many an epoch holds.
    """

    def __init__(self, sources: Sequence[Source], entries: Sequence[MixtureEntry]) -> None:
        names = [name_of(entry) for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"data.mixture: {', '.join(twice)} stands there twice, and losses and counts go by name. Give each "
                "entry a name of its own."
            )
        self.sources, self.entries, self.names = list(sources), list(entries), names
        self._taken = [
            take(len(source), entry, f"{MIXTURE_VERSION} {name} {source.fingerprint}")
            for source, entry, name in zip(sources, entries, names, strict=True)
        ]
        self._ends = np.cumsum([len(taken) for taken in self._taken])
        self._counts = _shares([len(taken) for taken in self._taken], entries)
        self.epoch_samples = sum(self._counts)
        parts = (source.columns.take(taken) for source, taken in zip(sources, self._taken, strict=True))
        self._columns = Columns.concatenate(
            [
                replace(part, sources=tuple(self._source(place, name) for name in part.sources))
                for place, part in enumerate(parts)
            ]
        )
        text = "\n".join(
            f"{name} {source.fingerprint} {entry.repeat} {entry.weight} {entry.take}"
            for source, entry, name in zip(sources, entries, names, strict=True)
        )
        self._fingerprint = hashlib.sha256(f"{MIXTURE_VERSION}\n{text}".encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Record:
        entry, number = self._place(index)
        record = self.sources[entry][number]
        return replace(record, key=self._key(entry, record.key), source=self._source(entry, record.source))

    def key(self, index: int, /) -> str:
        entry, number = self._place(index)
        return self._key(entry, self.sources[entry].key(number))

    def outline(self, index: int, /) -> Outline:
        entry, number = self._place(index)
        outline = self.sources[entry].outline(number)
        return outline._replace(key=self._key(entry, outline.key))

    def stored(self, index: int, /) -> tuple[bytes, list[bytes]]:
        entry, number = self._place(index)
        return self.sources[entry].stored(number)

    @property
    def columns(self) -> Columns:
        return self._columns

    @property
    def fingerprint(self) -> str:
        """Of the sources, and of how they are mixed."""
        return self._fingerprint

    def parts(self) -> dict[str, str]:
        found = {}
        for name, source in zip(self.names, self.sources, strict=True):
            found |= {f"{name}/{part}": digest for part, digest in source.parts().items()}
        return found

    def numbers(self, epoch: int, seed: int) -> Int[ndarray, " e"]:
        """The samples of an epoch, one source after the other."""
        chosen = []
        for end, taken, count, name in zip(self._ends, self._taken, self._counts, self.names, strict=True):
            numbers = np.arange(end - len(taken), end)
            passes, rest = divmod(count, len(taken))
            drawn = shuffled(len(taken), f"{MIXTURE_VERSION} {self._fingerprint} {name} {seed} {epoch}")[:rest]
            chosen += [*([numbers] * passes), numbers[np.sort(drawn)]]
        return np.concatenate(chosen)

    def describe(self) -> str:
        parts = []
        for source, entry, name, taken, count in zip(
            self.sources, self.entries, self.names, self._taken, self._counts, strict=True
        ):
            part = f"{name}: {count:,} an epoch ({count / self.epoch_samples:.1%})"
            part += f" of {len(taken):,}" if entry.take == "all" else f" of {len(taken):,} ({entry.take})"
            parts.append(f"{part}, {source.describe()}")
        return f"{self.epoch_samples:,} samples an epoch of {len(self.sources)} sources; " + "; ".join(parts)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        entry = int(np.searchsorted(self._ends, index, side="right"))
        taken = self._taken[entry]
        return entry, int(taken[index - self._ends[entry] + len(taken)])

    def _key(self, entry: int, key: str) -> str:
        return f"{self.names[entry]}/{key}" if len(self.names) > 1 else key

    def _source(self, entry: int, source: str) -> str:
        if len(self.names) == 1 and source:
            return source
        return f"{self.names[entry]}/{source}" if source else self.names[entry]


def open_mixture(config: DataConfig) -> Mixture:
    """The training shards of every entry of ``data.mixture``.

    Raises:
        ValueError: an entry is not there or cannot be taken from, or the cache holds too little of the remote ones.
    """
    for entry in config.mixture:
        if "://" not in entry.root:
            check_set(Path(entry.root))
    folders = [open_folder(entry.root, "train", config) for entry in config.mixture]
    if any("://" in entry.root for entry in config.mixture):
        from deepstack_pl.data.remote import RemoteFolder, check_order  # as in `open_folder`

        remote = [info for folder in folders if isinstance(folder, RemoteFolder) for info in folder.infos.values()]
        check_order(remote, config)  # each fits into the cache, and they share it
    return Mixture([ShardSource(folder) for folder in folders], config.mixture)


def name_of(entry: MixtureEntry) -> str:
    """What an entry is called in keys, counts and logs.

    Raises:
        ValueError: its folder has no name either.
    """
    name = entry.name or PurePosixPath(entry.root).name
    if not name:
        raise ValueError(f"data.mixture: root={entry.root} has no name of its own. Give the entry one: name=...")
    return name


def take(n: int, entry: MixtureEntry, text: str) -> Int[ndarray, " taken"]:
    """The samples of ``n`` that ``entry.take`` asks for, in order: LLaVA-NeXT's ``first:``, ``end:`` and ``random:``.

    Raises:
        ValueError: none, or more than there are.
    """
    kind, _, amount = entry.take.partition(":")
    if kind == "all":
        return np.arange(n)
    # Fractions, since 500 * 32.2 / 100 is more than 161 in floating point, and is rounded up.
    count = math.ceil(n * Fraction(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    if not 1 <= count <= n:
        raise ValueError(
            f"data.mixture: take={entry.take} of {entry.root}, which holds {n:,} samples, are {count:,}. Take at least "
            "one and at most all."
        )
    match kind:
        case "first":
            return np.arange(count)
        case "end":
            return np.arange(n - count, n)
        case _:
            return np.sort(shuffled(n, f"{text} {entry.take}")[:count])


def _shares(taken: Sequence[int], entries: Sequence[MixtureEntry]) -> list[int]:
    """How many samples of each entry an epoch holds; by weight, to the nearest, largest remainders first."""
    if entries[0].weight is None:
        return [count * entry.repeat for count, entry in zip(taken, entries, strict=True)]
    total, weights = sum(taken), [entry.weight or 0.0 for entry in entries]
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in largest[: total - sum(counts)]:
        counts[place] += 1
    empty = [name_of(entry) for entry, count in zip(entries, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"data.mixture: the weight of {', '.join(empty)} is less than one of {total:,} samples.")
    return counts
