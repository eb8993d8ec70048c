"""``deepstack shards verify``: every shard read whole and proved."""

import sys
from pathlib import Path

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Source

HELP = "every shard read whole: archive, index and manifest must agree; a missing index is written"
EXAMPLE = "deepstack shards verify root=DIR"
OWN = {"root": "folder of shards, or of folders of shards; default: what data= says"}


def run(run: RunConfig, own: dict[str, str]) -> int:
    """Verify; 1 where anything is damaged.

    Raises:
        ValueError: there are no shards.
    """
    from deepstack_pl.data.fine_print import fine_print_folder
    from deepstack_pl.data.sources import shards_root
    from deepstack_pl.data.verify import shard_folders, verify

    data = run.data
    if "root" in own:
        root = own["root"]
    elif data.source is Source.corpus:
        root = shards_root(data)
    elif data.source is Source.fine_print:
        root = str(fine_print_folder(data.fine_print, Path(data.root)))
    elif data.source is Source.shards:
        root = data.root
    else:
        raise ValueError(f"data.source={data.source.name} reads no shards. Say root=DIR.")
    if "://" in root:
        raise ValueError(f"{root} is remote: a run checks the digest of every shard that it fetches. Verify a copy.")
    found = verify(shard_folders(Path(root)), Path(root))
    for sentence in found.damage:
        print(sentence, file=sys.stderr)
    for index in found.written:
        print(f"written: {index}")
    speed = f", {found.bytes / found.seconds / 1e6:,.0f} MB/s" if found.seconds else ""
    print(f"{found.samples:,} samples in {found.shards} shards of {root}, {found.bytes / 1e6:,.1f} MB{speed}")
    print(f"{len(found.damage)} damaged" if found.damage else "all whole")
    return 1 if found.damage else 0
