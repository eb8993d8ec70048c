"""Where a conversion finds its files: the checkpoint, the tower it was made with, a tokenizer; and where it writes.

Everything may be a local folder or a name on the Hugging Face hub.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deepstack_pl.multimodal.published.configuration import TOWER_FOLDER
from deepstack_pl.multimodal.published.tower import OPENAI

CONFIG = "config.json"
PIXELS = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a tokenizer
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def local_folder(name: str, what: str, remedy: str, files: Sequence[str], *, by_hand: str = "") -> Path:
    """``name`` as a folder, fetched from the Hugging Face hub where it is none here.

    Args:
        what: says in a message what was looked for.
        remedy: what to do where it is not found.
        files: patterns of the files to fetch.
        by_hand: how to fetch what may well be on the hub.

    Raises:
        ValueError: it is neither here nor there.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"{what} {name} is a file. Give the folder it stands in.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except HFValidationError as error:
        raise ValueError(
            f"{what} {name!r}: there is no such folder, and it is no name on a hub either. {remedy}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{what} {name!r}: there is no such folder, and the Hugging Face hub gives none of that name, or cannot be "
            f"reached ({type(error).__name__}). {by_hand or remedy}"
        ) from error


def checkpoint_folder(source: str) -> Path:
    """The folder of a published checkpoint."""
    fetch = f"hf download {shlex.quote(source)} --local-dir FOLDER"
    return local_folder(
        source,
        "The checkpoint",
        "Give the folder of a whole checkpoint.",
        (CONFIG, PIXELS, "generation_config.json", f"{TOWER_FOLDER}/*.json", *TOKENIZER_FILES, *_WEIGHTS),
        by_hand=f"Where there is a network, `{fetch}` fetches it; then convert FOLDER.",
    )


def find_tower(
    name: Any, folder: Path, given: str | None
) -> tuple[Path | None, Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Where the tower's configuration was found (None: known without files), it, and that of its image processor.

    ``given`` goes first; then ``name`` (what ``mm_vision_tower`` says) as a folder inside the checkpoint, beside it,
    from the working directory or absolute; then OpenAI's names; then the checkpoint's own description; then the hub.

    Raises:
        ValueError: it is nowhere.
    """
    remedy = "Give the folder with the tower's config.json: --vision-tower FOLDER. Its weights are not needed."
    wanted = (CONFIG, PIXELS)
    if given is not None:
        place = local_folder(given, "The vision tower", remedy, wanted)
        return place, read_json(place / CONFIG), _if_there(place / PIXELS)
    if not isinstance(name, str) or not name:
        return None, None, None  # read_config says what is wrong
    for place in (folder / name, folder.parent / name, Path(name)):
        if (place / CONFIG).is_file():
            return place, read_json(place / CONFIG), _if_there(place / PIXELS)
    if name in OPENAI:
        return None, None, None
    own = folder / TOWER_FOLDER
    place = own if (own / CONFIG).is_file() else local_folder(name, "mm_vision_tower", remedy, wanted)
    return place, read_json(place / CONFIG), _if_there(place / PIXELS)


def find_tokenizer(folder: Path, given: str | None) -> Path | None:
    """The folder with tokenizer files: ``given``, or the checkpoint's own; None where there are none.

    Raises:
        ValueError: ``given`` holds none.
    """
    if given is None:
        return folder if _has_tokenizer(folder) else None
    place = local_folder(given, "The tokenizer", "Give a folder that holds its files.", TOKENIZER_FILES)
    if not _has_tokenizer(place):
        raise ValueError(f"The tokenizer {given}: the folder holds none of {', '.join(_VOCABULARIES)}. Give another.")
    return place


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Tokenizer files, as they are."""
    destination.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is not there, or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no {file.name}. Give the folder of a whole checkpoint.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object. Fetch it again.")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``destination`` if all goes well and vanishes if not.

    Raises:
        ValueError: something is there already.
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already, and not empty. Name a new folder, or remove that one.")
    partial = destination.parent / f".{destination.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{destination} cannot be written ({error.strerror}). Name another place.") from error
    try:
        yield partial
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone by its own name where all went well


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def _if_there(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None
