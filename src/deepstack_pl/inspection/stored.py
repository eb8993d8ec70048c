"""A case of published inputs and outputs, read from a folder in the layout of `tests/golden/README.md`.

Nothing here knows a size: tower, language model, samples and stored quantities are whatever the files say. A file that
is not as the layout says is refused with a sentence; a quantity that the layout does not know is named, never skipped.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_META = {"kind", "checkpoint", "grids", "image_sizes", "images", "greedy"}


@dataclass(kw_only=True, slots=True)
class StoredCase:
    """One case: what goes in, and what the published code made of it.

    Attributes:
        published, tower, pixels: the published config.json, and the two of the vision tower.
        checkpoint: the folder of the weights.
        ids, labels: for each sample its unpadded row, placeholders not yet expanded.
        images: for each sample its picture, None for text alone.
        grids, sizes: for each sample its grid (columns, rows) and its picture's size; None where not stored.
        greedy: for each sample its greedy answer, None where not stored.
        views: preprocessed views by sample; layer_inputs: by layer; gradients: by published key.
        unknown: tensors that are stored, but that nothing here knows how to compare.
        unread: values of meta.json that nothing here reads.
    """

    name: str
    published: dict[str, Any]
    tower: dict[str, Any]
    pixels: dict[str, Any]
    checkpoint: Path
    ids: list[list[int]]
    labels: list[list[int]]
    images: list[Path | None]
    grids: list[tuple[int, int] | None]
    sizes: list[tuple[int, int] | None]
    greedy: list[list[int] | None]
    views: dict[int, Tensor]
    layer_inputs: dict[int, Tensor]
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    unknown: list[str]
    unread: list[str]


def cases_of(folder: Path) -> list[str]:
    """The names of the cases in ``folder``.

    Raises:
        ValueError: there are none.
    """
    cases = folder / "cases"
    names = sorted(f.name for f in cases.iterdir() if f.is_dir() and f.name[0] != ".") if cases.is_dir() else []
    if not names:
        raise ValueError(
            f"{folder}: there are no cases. The layout is {folder}/cases/<case>/config.json, meta.json, "
            "inputs.safetensors, outputs.safetensors, with checkpoints/ and the tower's folder beside cases/."
        )
    return names


def read_case(folder: Path, name: str) -> StoredCase:
    """Read case ``name`` of ``folder``.

    Raises:
        ValueError: a file is missing or is not as the layout says.
    """
    home = folder / "cases" / name
    published, meta = _json(home / "config.json"), _json(home / "meta.json")
    tower = _tower_folder(folder, published)
    inputs, outputs = read_tensors(home / "inputs.safetensors"), read_tensors(home / "outputs.safetensors")
    ids, labels = _rows(inputs, home)
    samples = len(ids)
    views, layer_inputs = _numbered(inputs, "views."), _numbered(outputs, "layer_input.")
    _check_outputs(outputs, layer_inputs, home)
    gradients = {key.removeprefix("grad."): value for key, value in outputs.items() if key.startswith("grad.")}
    read = {"input_ids", "attention_mask", "labels", *(f"views.{i}" for i in views if i < samples)}
    compared = {"logits", "loss", *(f"layer_input.{i}" for i in layer_inputs), *(f"grad.{key}" for key in gradients)}
    unknown = [f"{key} of inputs.safetensors" for key in sorted(inputs.keys() - read)]
    unknown += [f"{key} of outputs.safetensors" for key in sorted(outputs.keys() - compared)]
    names = _each(meta, "images", samples, home) or [_usual(home, row) for row in range(samples)]
    return StoredCase(
        name=name,
        published=published,
        tower=_json(tower / "config.json"),
        pixels=_json(tower / "preprocessor_config.json"),
        checkpoint=_checkpoint(folder, meta, home),
        ids=ids,
        labels=labels,
        images=[_picture(home, image) for image in names],
        grids=_pairs(meta, "grids", samples, home),
        sizes=_pairs(meta, "image_sizes", samples, home),
        greedy=_answers(meta, samples, home),
        views={i: value for i, value in views.items() if i < samples},
        layer_inputs=layer_inputs,
        logits=outputs["logits"],
        loss=outputs["loss"],
        gradients=gradients,
        unknown=unknown,
        unread=sorted(meta.keys() - _META),
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is not there, or is no such file.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file, but the layout needs it.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}. Fetch it again.") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file, but the layout needs it.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}. Correct it, or fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, but must hold an object of names and values.")
    return values


def _tower_folder(folder: Path, published: dict[str, Any]) -> Path:
    """Where config.json says, else (it may name a tower of the hub) where the layout says."""
    named = published.get("mm_vision_tower")
    places = [folder / named] if isinstance(named, str) and named else []
    places.append(folder / "vision_tower")
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ValueError(
        f"mm_vision_tower={named}: there is no {' and no '.join(str(place / 'config.json') for place in places)}. "
        "The tower's config.json and preprocessor_config.json must lie in the folder."
    )


def _checkpoint(folder: Path, meta: dict[str, Any], home: Path) -> Path:
    named = meta.get("checkpoint")
    if not isinstance(named, str):
        raise ValueError(f"{home / 'meta.json'} names no `checkpoint`; write the folder of its model.safetensors.")
    if not (folder / named).is_dir():
        raise ValueError(f"{home / 'meta.json'} names checkpoint {named}, but {folder} has no such folder.")
    return folder / named


def _rows(inputs: dict[str, Tensor], home: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Each sample's ids and labels, without padding."""
    file = home / "inputs.safetensors"
    missing = sorted({"input_ids", "attention_mask", "labels"} - inputs.keys())
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}, which the layout needs.")
    ids, mask, labels = (inputs[key] for key in ("input_ids", "attention_mask", "labels"))
    if ids.ndim != 2 or not ids.numel() or not ids.shape == mask.shape == labels.shape:
        shapes = [list(inputs[key].shape) for key in ("input_ids", "attention_mask", "labels")]
        raise ValueError(f"{file}: input_ids, attention_mask and labels are {shapes}, but must be one [samples, ids].")
    keep = [row.bool() for row in mask]
    return [[row[k].tolist() for row, k in zip(each, keep, strict=True)] for each in (ids, labels)]  # pyright: ignore


def _check_outputs(outputs: dict[str, Tensor], layer_inputs: dict[int, Tensor], home: Path) -> None:
    """A case without what the model makes of its inputs would equal anything."""
    missing = [key for key in ("logits", "loss") if key not in outputs]
    missing += [] if layer_inputs else ["layer_input.<number>"]
    if missing:
        raise ValueError(
            f"{home / 'outputs.safetensors'} lacks {', '.join(missing)}: nothing would be compared with what the model "
            "computes. Store them as the layout says."
        )


def _numbered(tensors: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    ends = {key: key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    numbers = {int(end): key for key, end in ends.items() if end.isdecimal()}
    return {number: tensors[numbers[number]] for number in sorted(numbers)}


def _each(meta: dict[str, Any], key: str, samples: int, home: Path) -> list[Any] | None:
    """A list of meta.json with an entry for each sample."""
    values = meta.get(key)
    if values is not None and (not isinstance(values, list) or len(values) != samples):
        held = f"{len(values)} entries" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ValueError(f"{home / 'meta.json'}: {key} holds {held}, but there are {samples} samples: one for each.")
    return values


def _pairs(meta: dict[str, Any], key: str, samples: int, home: Path) -> list[tuple[int, int] | None]:
    values = _each(meta, key, samples, home) or [None] * samples
    for value in values:
        if value is not None and not (_whole_numbers(value) and len(value) == 2):
            raise ValueError(f"{home / 'meta.json'}: {key} holds {value!r}, but must hold pairs [width, height].")
    return [None if value is None else (value[0], value[1]) for value in values]


def _answers(meta: dict[str, Any], samples: int, home: Path) -> list[list[int] | None]:
    values: list[list[int] | None] = _each(meta, "greedy", samples, home) or [None] * samples
    for value in values:
        if value is not None and not (_whole_numbers(value) and value):
            raise ValueError(f"{home / 'meta.json'}: greedy holds {value!r}, but must hold lists of ids.")
    return values


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) for number in value)


def _usual(home: Path, row: int) -> str | None:
    name = f"image_{row}.png"
    return name if (home / name).is_file() else None


def _picture(home: Path, name: Any) -> Path | None:
    if name is None:
        return None
    if not isinstance(name, str) or not (home / name).is_file():
        raise ValueError(f"{home / 'meta.json'} names the image {name!r}, but there is no such file in {home}.")
    return home / name
