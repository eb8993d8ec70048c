"""Published checkpoints into this project's format, and back: folder to folder, tensors byte for byte.

Strict: every tensor is used, or named in an error; a value of config.json is used, known not to matter, or named in the
report. Weights, the tower's too, come from the checkpoint alone (method E6). Whole models are never in memory: tensors
go from file to file, a shard at a time, and shapes are checked against a model without weights.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepstack_pl.language.conversation import image_token_id
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.published.configuration import (
    TOWER_FOLDER,
    post_encoder_layers,
    read_config,
    unread_keys,
    write_config,
)
from deepstack_pl.multimodal.published.files import (
    CONFIG,
    PIXELS,
    checkpoint_folder,
    find_tower,
    read_json,
    whole_or_nothing,
    write_json,
)
from deepstack_pl.multimodal.published.host import host_of
from deepstack_pl.multimodal.published.keys import EMBEDDINGS, canonical, spare_head, to_published
from deepstack_pl.multimodal.published.text import (
    GENERATION,
    TOKEN_IDS,
    check_vocabulary,
    generation_settings,
    keep_tokenizer,
    settings_left_behind,
    tokenizer_back,
)
from deepstack_pl.multimodal.published.tower import OPENAI, write_tower
from deepstack_pl.multimodal.published.words import crashing_words
from deepstack_pl.multimodal.strict import check_tensors, own_shapes
from deepstack_pl.multimodal.tensor_files import TensorFiles, size_of, write_tensors


def convert(
    source: str,
    destination: str | Path,
    *,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Write the published checkpoint ``source`` to the new folder ``destination``, for `from_pretrained`.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        vision_tower: the tower's configuration, where ``mm_vision_tower`` does not lead to it.
        tokenizer: a tokenizer, where the checkpoint holds none.
        template: a conversation template, where it is not the host's own.
        report: takes the lines that tell what was done.

    Raises:
        ValueError: anything is missing, left over or unknown; nothing is left at ``destination`` then.
    """
    with whole_or_nothing(Path(destination)) as folder:
        origin = checkpoint_folder(source)
        published = read_json(origin / CONFIG)
        if published.get("model_type") == DeepStackConfig.model_type:
            raise ValueError(f"{source} is in this project's format already. `--to published` takes it back.")
        place, tower, pixels = find_tower(published.get("mm_vision_tower"), origin, vision_tower)
        words = keep_tokenizer(origin, tokenizer, folder)
        token = -200 if words is None else image_token_id(words)
        config = read_config(published, tower, pixels, template=template, image_token_id=token)
        if words is not None:
            check_vocabulary(words, config.text_config.vocab_size)
        settings = generation_settings(origin, config, words)
        files = TensorFiles(origin)
        found = {canonical(name): name for name in files}
        shapes = own_shapes(config)
        names = {ours: to_published(ours, config) for ours in shapes}
        spare = spare_head(config, files, found, source)
        expected = {p: _part(shapes[o], len(ps)) for o, ps in names.items() for p in ps}
        check_tensors(expected, files, found, source, spare)
        dtypes = {ours: _dtype(files, [found[p] for p in names[ours]]) for ours in shapes}

        def load(ours: str) -> Tensor:
            parts = [files[found[name]] for name in names[ours]]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        write_tensors(folder, {ours: size_of(shapes[ours], dtypes[ours]) for ours in shapes}, load)
        if len(set(dtypes.values())) == 1:
            config.dtype = next(iter(dtypes.values()))
        config.architectures = [DeepStackForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        settings.save_pretrained(folder)
    for line in _read(source, published, config, place, pixels):
        report(line)
    settings_left = settings_left_behind(origin, published)
    if settings_left:
        report(f"settings of generate left behind: {', '.join(settings_left)}. Give generate those you want")
    for name in spare:
        report(f"{name} is stored, but tied to {EMBEDDINGS} and equal: one is kept, and the way back writes one")
    report(
        f"tensors: {len(files)} read, {len(shapes)} written ({', '.join(sorted(map(_short, set(dtypes.values()))))})"
    )
    for line in _next_steps(destination, words, config.template):
        report(line)


def convert_back(source: str, destination: str | Path, *, report: Callable[[str], None] = print) -> None:
    """Write a model of this project, converted or trained here, to ``destination`` in the published format.

    Raises:
        ValueError: the published code has no words for it, or files are not whole; nothing is left then.
    """
    with whole_or_nothing(Path(destination)) as folder:
        origin = Path(source)
        kind = read_json(origin / CONFIG).get("model_type")
        if kind != DeepStackConfig.model_type:
            raise ValueError(
                f"{source} is a {kind!r}, not a model of this project ({DeepStackConfig.model_type}). Without "
                "`--to published` it is converted into one."
            )
        config = DeepStackConfig.from_pretrained(origin)
        if config.lora:
            raise ValueError(
                f"{source} holds adapters, which the published code does not know. Merge them first: `deepstack export "
                f"{shlex.quote(source)} FOLDER --merge-lora`, then convert FOLDER."
            )
        written = write_config(config)
        files, shapes = TensorFiles(origin), own_shapes(config)
        check_tensors(shapes, files, {name: name for name in files}, source)
        names = {ours: to_published(ours, config) for ours in shapes}
        owners = {name: (ours, place) for ours, several in names.items() for place, name in enumerate(several)}
        sizes = {name: size_of(_part(shapes[o], len(names[o])), files.dtype(o)) for name, (o, _) in owners.items()}

        def load(name: str) -> Tensor:
            ours, place = owners[name]
            return files[ours].chunk(len(names[ours]))[place] if len(names[ours]) > 1 else files[ours]

        about_tokenizer = tokenizer_back(origin, folder)
        write_tensors(folder, sizes, load)
        write_json(folder / CONFIG, written)
        _describe_tower(folder, config, written)
        ids = {key: written[key] for key in TOKEN_IDS if written.get(key) is not None}
        write_json(folder / GENERATION, {**ids, "transformers_version": "4.39.3"})
    plan = config.typed_plan()
    report(f"read {source}: {written['model_type']}, {plan.llm_layers} layers, plan {plan.digest}")
    report(f"tensors: {len(files)} read, {len(sizes)} written")
    report(f"tower: {written['mm_vision_tower']}" + _tower_warning(written))
    report(about_tokenizer)
    if config.template != host_of(written).template:
        report(
            f"template: {config.template}, which the format cannot say: convert again with --template {config.template}"
        )
    report(f"written to {destination}, as {written['architectures'][0]}")


def _part(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return (shape[0] // parts, *shape[1:]) if parts > 1 else shape


def _dtype(files: TensorFiles, names: list[str]) -> torch.dtype:
    dtypes = {files.dtype(name) for name in names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{', '.join(names)} are of different dtypes ({', '.join(sorted(map(_short, dtypes)))}), but become one "
            "tensor. Save the checkpoint in one dtype."
        )
    return dtypes.pop()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(
    source: str, published: Mapping[str, Any], config: DeepStackConfig, place: Path | None, pixels: object
) -> list[str]:
    plan, vision = config.typed_plan(), config.typed_vision()
    shape = f"{vision.layers} layers, {vision.image_size} px, state {vision.tap}"
    lines = [
        f"read {source}: {config.text_config.model_type}, {plan.llm_layers} layers",
        f"tower: {vision.name} ({shape}), configured by {place or 'its name'}, weights of the checkpoint",
        plan.draw(),
    ]
    if place is not None and pixels is None:
        lines.append(f"no {PIXELS} at {place}: CLIP's own mean and deviation are taken")
    lines += [
        f"{word}: the published code crashes on it; here it does what it was meant to"
        for word in crashing_words(published)
    ]
    unread = unread_keys(published)
    return [*lines, f"not read, but kept for the way back: {', '.join(unread)}"] if unread else lines


def _next_steps(destination: str | Path, words: PreTrainedTokenizerFast | None, template: str) -> list[str]:
    if words is None:
        about = (
            "tokenizer: the checkpoint holds none, so that the model takes ids alone (an image is -200). For text, "
            "convert again with --tokenizer, a folder or a name on the hub"
        )
    else:
        about = f"tokenizer: {len(words)} tokens, <image> is {image_token_id(words)}; template {template}"
    folder = shlex.quote(str(destination))
    return [
        about,
        f"written to {destination}",
        f"load it:         DeepStackForConditionalGeneration.from_pretrained({str(destination)!r})",
        f"train from it:   python train.py {shlex.quote(f'init_from={destination}')} model=... llm=... vision=...",
        "                 (options that describe this language model and tower; nothing else is fetched)",
        f"take it back:    deepstack convert {folder} FOLDER --to published",
    ]


def _describe_tower(folder: Path, config: DeepStackConfig, written: Mapping[str, Any]) -> None:
    """A tower that the published code cannot know by name is described in the folder; `find_tower` looks there."""
    if written["mm_vision_tower"] in OPENAI:
        return
    vision = config.typed_vision()
    tower, pixels = write_tower(vision, vision.layers - post_encoder_layers(config))
    write_json(folder / TOWER_FOLDER / CONFIG, tower)
    write_json(folder / TOWER_FOLDER / PIXELS, pixels)


def _tower_warning(written: Mapping[str, Any]) -> str:
    if written.get("unfreeze_mm_vision_tower"):
        return ""
    return (
        "; its weights are in the checkpoint, but the published code takes those of that name unless config.json says "
        "unfreeze_mm_vision_tower: true. Say so if the tower was trained"
    )
