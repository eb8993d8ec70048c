"""What a checkpoint holds, back into a run of any number of processes.

Nothing is unpickled but names, shapes and places of tensors, and of what that takes there is a list: a checkpoint may
come from anywhere.
"""

import hashlib
import io
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from deepstack_pl.training.checkpoints import METADATA, MINE, PLAIN, Checkpoint
from deepstack_pl.training.store import flat

# All that names, shapes and places consist of, besides dtypes.
_HARMLESS = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.serialization", "_get_layout"),
}


def read_plain(checkpoint: Checkpoint) -> Any:
    """What was the same on all processes.

    Raises:
        ValueError: the file is not what was written.
    """
    return torch.load(io.BytesIO(_written(checkpoint, PLAIN)), map_location="cpu", weights_only=True)


def read_mine(checkpoint: Checkpoint, number: int) -> Any | None:
    """What process ``number`` had of its own; None if fewer saved.

    Raises:
        ValueError: the file is not what was written.
    """
    if number >= checkpoint.manifest["world"]:
        return None
    return torch.load(io.BytesIO(_written(checkpoint, MINE.format(number))), map_location="cpu", weights_only=True)


def read_tensors(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Into the tensors of ``state``, in place: each process its share, however many saved. `verify` comes before.

    Raises:
        ValueError: names, shapes or dtypes are others; nothing is read.
    """
    reader = _Reader(checkpoint)
    there = {name: _kind(saved.size, saved.properties.dtype) for name, saved in reader.tensors.items()}
    here = {name: _kind(tensor.shape, tensor.dtype) for name, tensor in flat(state)}
    both = [name for name in there if name in here]
    differ = [f"{name} was {there[name]} and is {here[name]}" for name in both if there[name] != here[name]]
    differ += [f"{name} was not saved" for name in here if name not in there]
    differ += [f"{name} was saved and is not here" for name in there if name not in here]
    if differ:
        more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise ValueError(
            f"{checkpoint.folder} is of another model or optimiser: {'; '.join(differ[:8])}{more}. Go on under the "
            "config it was saved with, or start a new run from its weights with init_from."
        )
    dcp.load(state, storage_reader=reader, no_dist=True)


def read_model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights alone, whole, on the CPU, by their names in the model.

    Raises:
        ValueError: a file is not what was written.
    """
    reader, head = _Reader(checkpoint), "model."
    weights = {
        name.removeprefix(head): torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in reader.tensors.items()
        if name.startswith(head)
    }
    dcp.load({"model": weights}, storage_reader=reader, no_dist=True)
    return weights


class _Reader(FileSystemReader):
    """torch's, without its pickles."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.folder)
        self._metadata = _Harmless(io.BytesIO(_written(checkpoint, METADATA))).load()

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return self._metadata.state_dict_metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Harmless(pickle.Unpickler):
    """Makes what is on the list, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not dtype and (module, name) not in _HARMLESS:
            raise ValueError(
                f"{METADATA} names {module}.{name}, which no checkpoint of tensors does: it is not read, for it may "
                "run anything. Go on with another checkpoint."
            )
        return super().find_class(module, name)


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _written(checkpoint: Checkpoint, name: str) -> bytes:
    """The content of a small file, if it is what the manifest says."""
    file = checkpoint.folder / name
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != checkpoint.manifest["files"][name]["sha256"]:
        raise ValueError(f"{file} is not what was written (another SHA-256), and is not read.")
    return content
