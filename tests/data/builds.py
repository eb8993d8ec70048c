"""What the tests of building share."""

from pathlib import Path

from replicas import IMAGES, JSON, Replica, jpeg, picture, write_replica

from deepstack_pl.data.build import How, Report, build
from deepstack_pl.data.config import DataConfig, OnMissing
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.corpora import corpus_files
from deepstack_pl.data.sources import ShardSource

SKIP = How(missing=OnMissing.skip)
SMALL = How(missing=OnMissing.skip, max_bytes=100_000)


def config_of(replica: Replica, **more: object) -> DataConfig:
    values = {"name": replica.name, "source": Kind.corpus, "root": str(replica.root)}
    paths = {"path": JSON[replica.name], "images": IMAGES.get(replica.name, ".")}
    return DataConfig(**{**values, **paths, **more})  # pyright: ignore[reportArgumentType]


def built(replica: Replica, out: Path, how: How = SKIP) -> Report:
    return build(corpus_files(config_of(replica)), out, how)


def rows_of(source: ShardSource) -> list[int]:
    return [int(source.key(i).rpartition(":")[2]) for i in range(len(source))]


def tars(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def large(root: Path, clean: bool = True) -> Replica:
    """A replica of several shards: its images are larger."""
    replica = write_replica("llava665k", root, clean)
    for row, record in enumerate(replica.records):
        if isinstance(record.get("image"), str) and row < 30:
            (replica.images / record["image"]).write_bytes(jpeg(picture(row, 500, 400)) + bytes(9000))
    return replica
