"""Which samples, from where, in what batches. Loads without torch."""

import re
from dataclasses import dataclass, field
from enum import Enum

from deepstack_pl.vision.config import ViewsBackend


class Source(Enum):
    """Where samples come from."""

    fine_print = "fine_print"  # the synthetic set, written to shards once
    shards = "shards"  # WebDataset tars: root/train/*.tar and root/val/*.tar, image and json in LLaVA's format
    llava_json = "llava_json"  # one LLaVA-format JSON file and a folder of images, read as they lie
    corpus = "corpus"  # shards that `deepstack shards build` made of a LLaVA-format JSON file and images


class StreamKind(Enum):
    """How shards are read."""

    indexed = "indexed"  # random access through an index: an exact order, exact resume, every sample once an epoch
    webdataset = "webdataset"  # the library's own pipeline, for remote shards without an index; none of these


class Shuffle(Enum):
    """How far from its neighbours on disk a sample may travel in an epoch."""

    full = "full"  # any sample anywhere: for local disks
    blocks = "blocks"  # blocks of neighbours change places, then samples within a window: few shards at a time


class Batching(Enum):
    """What shares a batch."""

    samples = "samples"  # as they come
    modality_length = "modality_length"  # LLaVA's: images with images, text with text, like lengths together
    token_budget = "token_budget"  # each micro-batch: as many samples as fit into token_budget positions, padded
    packed = "packed"  # each row: samples that together fill llm.max_length positions


class Remainder(Enum):
    """What becomes of the samples that do not fill an epoch's last batch."""

    pad = "pad"  # the batch is filled with rows that count nothing
    drop = "drop"  # they are left out of that epoch, and it is said


class OnMissing(Enum):
    """`shards build`: what becomes of a record that cannot be taken."""

    error = "error"  # nothing is built; all of them are listed
    skip = "skip"  # it is left out, and listed in the report


@dataclass(kw_only=True, slots=True)
class FinePrintConfig:
    """The synthetic set's difficulty and size; every value is part of the data's name on disk."""

    train_pages: int = 4096
    val_pages: int = 256
    seed: int = 0
    view_size: int = 32  # side of a view in pixels: what the global view shows the page at
    cells: int = 4  # cells a side; a page holds cells**2 coarse and cells**2 fine facts
    weaves: int = 4  # fine classes in use
    contrast: float = 69.0  # how far the page's deepest thread is from its swatch's colour, 8-bit levels
    flips: float = 0.0  # share of swatches with light and dark threads swapped; at 0.5 no linear reader sees a weave
    noise: float = 2.0  # paper grain, standard deviation in 8-bit levels

    def __post_init__(self) -> None:
        at = "data.fine_print"
        for name, pages in (("train_pages", self.train_pages), ("val_pages", self.val_pages)):
            if pages < 1:
                raise ValueError(f"{at}.{name}={pages}: a set has at least one page of each split.")
        if self.seed < 0:
            raise ValueError(f"{at}.seed={self.seed}: seeds count from 0.")
        if self.cells < 1 or self.view_size % self.cells or self.view_size // self.cells < 4:
            raise ValueError(
                f"{at}.cells={self.cells} does not divide {at}.view_size={self.view_size} into cells of 4 pixels or "
                "more: swatches must lie on the view's pixels. Choose a divisor of view_size that leaves 4 a cell."
            )
        if not 2 <= self.weaves <= 4:
            raise ValueError(f"{at}.weaves={self.weaves}: use 2 to 4 (plain, rows, columns, check).")
        if not 0 < self.contrast <= 69:
            raise ValueError(
                f"{at}.contrast={self.contrast}: use more than 0 and at most 69 levels; deeper threads would be "
                "clipped on the page, and clipped threads show in the global view."
            )
        if not 0 <= self.flips <= 0.5:
            raise ValueError(f"{at}.flips={self.flips}: a share from 0 to 0.5; above, it is the other polarity's.")
        if not 1 <= self.noise <= 8:
            raise ValueError(
                f"{at}.noise={self.noise}: use 1 to 8 levels; less grain does not hide how 8-bit rounding tells one "
                "weave from another in the global view, more is clipped."
            )


@dataclass(kw_only=True, slots=True)
class ExpectedConfig:
    """What the published files of a corpus hold; `shards build` compares and says it."""

    records: int | None = None
    text_only: int | None = None
    sources: dict[str, int] = field(default_factory=dict)  # records by the source that `llava.source_of` names


@dataclass(kw_only=True, slots=True)
class MixtureEntry:
    """One of several sets of shards that are trained on together; give ``repeat`` or, in all entries, ``weight``."""

    root: str = "???"  # a folder, local or remote, with train/*.tar
    name: str | None = None  # in logs; default: the folder's
    repeat: int = 1  # times an epoch holds each of its samples
    weight: float | None = None  # share of an epoch, drawn by seed and epoch
    take: str = "all"  # all, first:N, end:N, random:N; N a number of samples or a share such as 10%


@dataclass(kw_only=True, slots=True)
class ViewsConfig:
    """How images become views."""

    backend: ViewsBackend = ViewsBackend.pil


@dataclass(kw_only=True, slots=True)
class DataConfig:
    name: str = "???"
    source: Source = Source.fine_print
    root: str = "data"  # folder of what is built or downloaded; shards: the folder, or URL, with train/ and val/
    path: str | None = None  # llava_json: the JSON file; corpus: the same, under root
    images: str | None = None  # the folder that the records' image paths start from; corpus: under root
    shards: str | None = None  # corpus: where its shards are; default ROOT/shards/NAME
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)
    val_samples: int = 256  # llava_json, corpus: about so many records held out, drawn by seed; no image in both
    mixture: list[MixtureEntry] = field(default_factory=list)  # shards: trained on instead of root/train

    stream: StreamKind = StreamKind.indexed
    urls: str | None = None  # stream=webdataset: training shards, such as https://host/shard-{000000..000053}.tar
    shuffle: Shuffle = Shuffle.full
    block: int = 128  # shuffle=blocks: neighbours that stay together
    window: int = 4096  # shuffle=blocks, batching=token_budget and packed: samples that are planned together
    cache: str = "data/cache"  # where remote shards are kept
    cache_gb: float = 100.0  # and how many gigabytes of them

    batch_size: int = 64  # units in one optimiser step, over all processes: samples, micro-batches, or packed rows
    micro_batch_size: int | None = None  # units in one forward of one process; default: its share, or 1 micro-batch
    batching: Batching = Batching.samples
    token_budget: int = 16384  # batching=token_budget: positions of one micro-batch, padding included
    remainder: Remainder = Remainder.pad
    workers: int = 1
    epochs: float | None = None  # how often a run goes through the samples, instead of trainer.max_steps

    max_refused: float = 0.0  # share of an epoch's samples that may be unreadable or untrainable before the run stops
    max_cut: float = 0.05  # share that may be cut because they are too long
    views: ViewsConfig = field(default_factory=ViewsConfig)
    fine_print: FinePrintConfig = field(default_factory=FinePrintConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("block", self.block, 1),
            ("window", self.window, 1),
            ("token_budget", self.token_budget, 1),
            ("workers", self.workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value}: use {least} or more.")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"data.epochs={self.epochs}: use more than 0, or null and trainer.max_steps=N.")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"data.micro_batch_size={self.micro_batch_size} does not divide data.batch_size={self.batch_size}: "
                "a step is so many whole micro-batches. Choose a divisor."
            )
        if self.batching is Batching.token_budget and self.micro_batch_size not in (None, 1):
            raise ValueError(
                f"data.micro_batch_size={self.micro_batch_size} with data.batching=token_budget: there a unit is a "
                "micro-batch, and data.batch_size counts these. Say data.micro_batch_size=null."
            )
        for name, share in (("max_refused", self.max_refused), ("max_cut", self.max_cut)):
            if not 0 <= share <= 1:
                raise ValueError(f"data.{name}={share}: a share of samples, from 0 to 1.")
        if self.cache_gb <= 0:
            raise ValueError(f"data.cache_gb={self.cache_gb}: the cache holds at least one shard. Use more than 0.")
        for place, entry in enumerate(self.mixture):
            _check_entry(entry, f"data.mixture[{place}]", all_weighed=self.mixture[0].weight is not None)

    def micro_batch(self, world: int = 1) -> int:
        """Units in one forward of one of ``world`` processes.

        Raises:
            ValueError: a step is not so many whole micro-batches for every process.
        """
        each = 1 if self.batching is Batching.token_budget else self.batch_size // world
        size = self.micro_batch_size or each
        if not size or self.batch_size % (size * world):
            raise ValueError(
                f"data.batch_size={self.batch_size} is not a whole number of micro-batches of {size} for each of "
                f"{world} processes. Choose a data.batch_size that {max(size, 1) * world} divides."
            )
        return size

    def accumulation(self, world: int = 1) -> int:
        """Micro-batches that each of ``world`` processes runs in one optimiser step."""
        return self.batch_size // (self.micro_batch(world) * world)


def _check_entry(entry: MixtureEntry, at: str, *, all_weighed: bool) -> None:
    if entry.repeat < 1:
        raise ValueError(f"{at}.repeat={entry.repeat}: use 1 or more, or leave the entry out.")
    if entry.weight is not None and entry.weight <= 0:
        raise ValueError(f"{at}.weight={entry.weight}: use more than 0, or leave the entry out.")
    if (entry.weight is not None) is not all_weighed:
        raise ValueError(f"{at}: some entries of data.mixture have a weight and some have none. Weigh all, or none.")
    if entry.weight is not None and entry.repeat != 1:
        raise ValueError(f"{at}: repeat={entry.repeat} with weight={entry.weight}. Give one of the two.")
    if not re.fullmatch(r"all|(first|end|random):(\d+|\d+(\.\d+)?%)", entry.take):
        raise ValueError(f"{at}.take={entry.take}: use all, first:N, end:N or random:N, with N like 5000 or 10%.")
