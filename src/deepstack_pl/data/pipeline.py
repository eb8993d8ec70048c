"""``data.stream=webdataset``: remote shards without an index, through webdataset's own pipeline.

The library draws shards, groups members into samples and shuffles them in a buffer; the tars are read by `tars`,
because Python's tarfile takes damage in the middle of a shard for its end. What such a stream cannot promise is in
`LIMITS`. Every process draws shards of its own, endlessly, so all see the same number of batches.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards, expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from deepstack_pl.batch import MultimodalBatch, Record, Refused, Sample
from deepstack_pl.data.config import Batching, DataConfig
from deepstack_pl.data.download import Download, check_url, remote_size, shown
from deepstack_pl.data.index import image_members
from deepstack_pl.data.llava import record_from_llava, source_of
from deepstack_pl.data.stream import TIMEOUT, Blank, start_worker
from deepstack_pl.data.tars import read_members
from deepstack_pl.vision.images import decode_image

BUFFER = 1000  # samples, undecoded, that a worker shuffles among
LIMITS = (
    "data.stream=webdataset draws shards at random with replacement: within an epoch's worth of steps samples can "
    "repeat or be missed; the order depends on the number of processes and workers; a resumed run draws anew from its "
    "step instead of going on exactly; a damaged shard is found when it is read, not before. "
    "data.stream=indexed has none of these limits."
)
_log = logging.getLogger(__name__)

Prepare = Callable[[Record], Sample]
Collate = Callable[[list[Sample]], MultimodalBatch]


class PipelineSource:
    """The shards that ``data.urls`` names. How many samples they hold is not known, so it has no length.

    Raises:
        ValueError: no addresses, ones that cannot be opened here, or a setting that needs an index.
    """

    def __init__(self, config: DataConfig) -> None:
        if not config.urls:
            raise ValueError(
                "data.stream=webdataset without data.urls. Name the training shards, such as "
                "data.urls='https://host/train/shard-{000000..000053}.tar'."
            )
        if config.batching is not Batching.samples:
            raise ValueError(
                f"data.batching={config.batching.value} plans from an index, and data.stream=webdataset has none. "
                "Use data.batching=samples, or data.stream=indexed."
            )
        if config.mixture:
            raise ValueError(
                "data.mixture with data.stream=webdataset: shards are drawn from data.urls alone. Leave data.mixture "
                "out (join addresses by ::, each as often as it is to weigh), or use data.stream=indexed."
            )
        self.urls: list[str] = expand_urls(config.urls)
        for url in self.urls:
            check_url(url)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' names; nothing is known of their bytes."""
        return hashlib.sha256("\n".join(shown(url) for url in self.urls).encode()).hexdigest()

    def parts(self) -> dict[str, str]:
        """The shards' names, without digests of their bytes."""
        return {shown(url): "" for url in self.urls}

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.urls)} shards from {shown(self.urls[0])} on, streamed by webdataset; how many samples is not "
            "known, and the fingerprint is of the names, not of the bytes"
        )


class PipelineLoader:
    """The micro-batches of one process; as long as it says, whatever the shards hold."""

    def __init__(self, loader: "DataLoader[MultimodalBatch]", length: int) -> None:
        self._loader, self._length = loader, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[MultimodalBatch]:
        return islice(iter(self._loader), self._length)


def pipeline_loader(
    config: DataConfig,
    prepare: Prepare,
    blank: Blank,
    collate: Collate,
    *,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    timeout: float = TIMEOUT,
) -> PipelineLoader:
    """The micro-batches of process ``rank`` of ``world`` for ``steps`` optimiser steps from ``start_step`` on.

    What it draws is a function of (seed, start_step, rank, world, workers). A sample that is `Refused` becomes
    ``blank(key, source, (reason, sentence))``; anything else that goes wrong, damage to a shard above all, is raised.
    ``timeout``: seconds without a batch after which a worker counts as hung; servers are given up on sooner.

    Raises:
        ValueError: as `PipelineSource`; a batch size that ``world`` cannot share.
    """
    source = PipelineSource(config)
    size, accumulation = config.micro_batch(world), config.accumulation(world)
    if not rank:
        _log.warning(LIMITS)
    draws = f"{seed} {start_step} {rank} {world}"
    loader = DataLoader(
        _Batches(source.urls, prepare, blank, collate, size, draws),
        batch_size=None,
        num_workers=config.workers,
        timeout=timeout if config.workers else 0,
        generator=torch.Generator().manual_seed(seed),  # its own: see `stream.train_loader`
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return PipelineLoader(loader, steps * accumulation)


class _Batches(IterableDataset[MultimodalBatch]):
    """One worker's endless micro-batches."""

    def __init__(
        self, urls: list[str], prepare: Prepare, blank: Blank, collate: Collate, size: int, draws: str
    ) -> None:
        self.urls, self.prepare, self.blank, self.collate = urls, prepare, blank, collate
        self.size, self.draws = size, draws

    def __iter__(self) -> Iterator[MultimodalBatch]:
        worker = get_worker_info()
        samples = self.samples(worker.id if worker else 0, worker.num_workers if worker else 1)
        while batch := list(islice(samples, self.size)):
            yield self.collate(batch)

    def samples(self, worker: int, workers: int) -> Iterator[Sample]:
        digest = hashlib.sha256(f"{self.draws} {worker} {workers}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little")
        pipeline = DataPipeline(
            ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True),
            _members,
            group_by_keys,
            shuffle(BUFFER, seed=seed),
        )
        for members in pipeline:
            yield self._sample(members)

    def _sample(self, members: dict[str, Any]) -> Sample:
        key, source = f"{_name(members['__url__'])}:{members['__key__']}", ""
        if "json" not in members:
            raise ValueError(
                f"{key} has no json ({shown(members['__url__'])}). Store its record as KEY.json beside it."
            )
        try:
            values = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key}: its json cannot be read ({error}). Write the shard again.") from error
        try:
            source = source_of(values)
            found = image_members({name: 0 for name in members if not name.startswith("__")})
            images = [decode_image(members[name], f"{key}.{name}") for name, _ in found]
            return self.prepare(record_from_llava(values, images, key, source))
        except Refused as refused:
            return self.blank(key, source, (refused.reason, refused.sentence))


def _members(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The members of one shard after another, as `group_by_keys` takes them; a shard ends with an empty one."""
    for shard in shards:
        url: str = shard["url"]
        size, seen, last = remote_size(url), set(), ""
        with Download(url, size) as download:
            # The reader names the one in messages and only reads from the other.
            for member in read_members(cast(Path, shown(url)), cast(BinaryIO, download), size, _ignore):
                name = member.name.removeprefix("./")
                key, extension = base_plus_ext(name)
                if key is None or extension is None:
                    raise ValueError(f"{shown(url)}: {name} is not named KEY.EXTENSION, as 000000012.json is.")
                whole = (key, extension.lower())
                if (key != last and key in seen) or whole in seen:
                    raise ValueError(
                        f"{shown(url)}: {name} is there twice, or apart from the other members of its sample. Write a "
                        "sample's members one after another, keys used once."
                    )
                seen |= {key, whole}
                last = key
                yield {"fname": name, "data": member.data, "__url__": url}
        if not seen:
            raise ValueError(f"{shown(url)} holds no samples. Leave it out of data.urls.")
        yield {}


def _name(url: str) -> str:
    """The last two parts, as keys name shards."""
    return "/".join(urlsplit(url).path.strip("/").split("/")[-2:])


def _ignore(_data: bytes) -> None:
    """The members' bytes are not hashed here."""
