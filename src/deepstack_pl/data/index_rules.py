"""What must hold of an index before anything is read through it: a file may come from anywhere."""

from typing import TYPE_CHECKING

import numpy as np

from deepstack_pl.data.columns import ROWS

if TYPE_CHECKING:
    from deepstack_pl.data.index import ShardIndex

ARRAYS = ("offset", "size", "crc", "extension", "width", "height", "first", "key_ends", "key_bytes")


def broken_rules(index: "ShardIndex") -> list[str]:
    """What is wrong with ``index``, whose arrays are of the right lengths; that it is true only `verify` knows."""
    columns = index.columns
    arrays = [getattr(index, name) for name in ARRAYS] + [getattr(columns, name) for name in ROWS]
    if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in arrays):
        return ["arrays of other kinds"]
    if not all(isinstance(name, str) for name in (*index.extensions, *columns.sources)):
        return ["names that are no text"]
    keys = np.diff(index.key_ends, prepend=0)
    rules = {
        "a member outside of the shard": (
            (index.offset >= 0).all() and (index.size >= 0).all() and (index.size <= index.bytes - index.offset).all()
        ),
        "an extension without a name": (index.extension < len(index.extensions)).all() and "json" in index.extensions,
        "samples out of order": index.first[0] == 0 and (np.diff(index.first) > 0).all(),
        "keys out of order": (keys > 0).all() and keys.sum() == len(index.key_bytes),
        "a source without a name": ((columns.source >= 0) & (columns.source < len(columns.sources))).all(),
    }
    broken = [what for what, holds in rules.items() if not holds]
    if not broken:
        try:
            index.key_bytes.tobytes().decode()
        except UnicodeDecodeError:
            broken.append("keys that are not UTF-8")
    if not broken and len(index):
        record = index.extension == index.extensions.index("json")
        if not (np.add.reduceat(record, index.first[:-1], dtype=np.int64) == 1).all():
            broken.append("a sample without a record")
    return broken
