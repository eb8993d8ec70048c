"""The safetensors files of a folder as one mapping of names to tensors, read lazily; and the writing of such files.

One file or shards with an index, as Hugging Face lays them out. Reading is strict: the index and the shards must agree.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as Hugging Face cuts them
_PICKLES = (
    "{} holds its weights as .bin, pickles that run code when they are opened. Take a version with safetensors, or "
    "save it as such where you trust it."
)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of ``folder``, each read when it is asked for.

    Raises:
        ValueError: no weights there, or files that are not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}  # name of a tensor to the open file that holds it
        for name, promised in self._promised().items():
            opened = self._open(folder / name)
            held = set(opened.keys())
            if promised is not None and held != promised:
                differ = sorted(held ^ promised)
                raise ValueError(
                    f"{folder / name}: it and {INDEX} disagree about {len(differ)} tensors, the first being "
                    f"{differ[0]}. Fetch the checkpoint again, all its files from one version."
                )
            self._files |= dict.fromkeys(held, opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, of which nothing is read for it but an empty slice."""
        part = self._files[name].get_slice(name)
        return (part[:0] if part.get_shape() else self[name]).dtype

    def _promised(self) -> dict[str, set[str] | None]:
        """The files, with the tensors that the index says they hold (None: there is no index)."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file() and index.is_file():
            raise ValueError(
                f"{self.folder} holds {SINGLE} and {INDEX}: two sets of weights. Remove the one that does not belong."
            )
        if single.is_file():
            return {SINGLE: None}
        if not index.is_file():
            raise ValueError(self._no_weights())
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, set[str] | None] = {file: set() for file in sorted(set(places.values()))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors shards. Fetch it again.") from error
        strange = [file for file in shards if not isinstance(file, str)]
        if strange:
            raise ValueError(f"{index} names {strange[0]!r} as a file: it is no index of shards. Fetch it again.")
        absent = [file for file in shards if not (self.folder / file).is_file()]
        if absent:
            raise ValueError(
                f"{index} names {len(shards)} shards, and {len(absent)} of them cannot be found: {', '.join(absent)}. "
                "Fetch the checkpoint again, all its files."
            )
        return {file: {name for name, place in places.items() if place == file} for file in shards}

    def _no_weights(self) -> str:
        if any(self.folder.glob("*.bin")):
            return _PICKLES.format(self.folder)
        shards = len(list(self.folder.glob("*.safetensors")))
        held = f"{shards} safetensors files without {INDEX}" if shards else "no safetensors"
        return f"{self.folder} holds {held}. Weights are one {SINGLE}, or shards with their index: fetch it again."

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is no whole safetensors file ({str(error).splitlines()[0]}): a download that was cut off, or "
                "a pointer of git-lfs. Fetch it again."
            ) from error


def refuse_pickles_alone(folder: Any) -> None:
    """Refuse a folder that has weights, and none as safetensors; a name of the hub is nothing that could be looked at.

    Raises:
        ValueError: naming the folder, and what to do.
    """
    place = Path(folder) if folder is not None else None
    if place is not None and any(place.glob("*.bin")) and not any(place.glob("*.safetensors")):
        raise ValueError(_PICKLES.format(place))


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    load: Callable[[str], Tensor],
    *,
    limit: int = SHARD_BYTES,
) -> list[str]:
    """Write tensors into ``folder``, one shard in memory at a time; returns the files.

    Args:
        sizes: bytes of each tensor, by name.
        load: gives a tensor.
        limit: bytes of a shard.

    Raises:
        ValueError: there is no room for them, or a file cannot be written.
    """
    needed, free = sum(sizes.values()), disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{needed:,} bytes are to be written to {folder.parent}, where {free:,} are free. Make room.")
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        # A slice of another tensor is copied: a file holds no shared memory.
        held = {name: load(name).clone(memory_format=torch.contiguous_format) for name in names}
        try:
            save_file(held, folder / file, {"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be written to {folder.parent} ({str(error).splitlines()[0]}). Make room there, or name "
                "another place."
            ) from error
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": needed}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(INDEX)
    return files


def size_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return prod(shape) * dtype.itemsize
