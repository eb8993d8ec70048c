"""A whole set of shards, as ``ROOT/manifest.json`` lists it: what an interrupted copy has lost is noticed."""

import json
from pathlib import Path
from typing import Any

from deepstack_pl.data.shards import MANIFEST, ShardInfo, list_manifest, listed_shard

AGAIN = "Copy, fetch or build the set again."


def check_set(root: Path) -> dict[str, Any]:
    """What the set's manifest says of how it was made, once all that it lists is there; empty where it has none.

    No shard is read: their sizes are looked at, and what their split's manifest says of them.

    Raises:
        ValueError: a split or a shard that the manifest lists is not there as it is listed.
    """
    wrong = lost_of_set(root)
    if wrong:
        more = f" ({len(wrong)} such in all)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more} {AGAIN}")
    manifest = _read(root)
    return {} if manifest is None else dict(manifest.get("made_of", {}))


def splits_of_set(root: Path) -> list[str]:
    """The splits that the set's manifest lists."""
    manifest = _read(root)
    return [] if manifest is None else list(manifest["splits"])


def lost_of_set(root: Path) -> list[str]:
    """A sentence for every split and shard that the set's manifest lists and that is not there as it is listed."""
    manifest = _read(root)
    wrong = []
    for split, said in ({} if manifest is None else manifest["splits"]).items():
        folder = root / split
        if not (folder / MANIFEST).is_file():
            wrong.append(f"{folder} has no {MANIFEST}, but {root / MANIFEST} lists {len(said['shards'])} shards there.")
            continue
        its = {shard.name: shard for shard in list_manifest(folder) or ()}
        for shard in _shards(said, split, root):
            found = its.pop(shard.name, None)
            if found != shard:
                what = "does not list it" if found is None else "says otherwise of it"
                wrong.append(f"{folder / shard.name}: {root / MANIFEST} lists it, and {folder / MANIFEST} {what}.")
            elif not (folder / shard.name).is_file():
                wrong.append(f"{folder / shard.name} is not there, but {root / MANIFEST} lists it.")
        wrong += [f"{folder / name} stands in {folder / MANIFEST}, but not in {root / MANIFEST}." for name in its]
    return wrong


def _shards(said: dict[str, Any], split: str, root: Path) -> list[ShardInfo]:
    try:
        names = (values["name"].removeprefix(f"{split}/") for values in said["shards"])
        return [listed_shard(**{**values, "name": name}) for values, name in zip(said["shards"], names, strict=True)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / MANIFEST} is no manifest of a set ({error}). {AGAIN}") from error


def _read(root: Path) -> dict[str, Any] | None:
    """None without a manifest, and where it is one of a single folder of shards."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        return manifest if isinstance(manifest, dict) and isinstance(manifest.get("splits"), dict) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a set ({error}). {AGAIN}") from error
