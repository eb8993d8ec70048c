"""What a conversion does about text: the tokenizer, both ways, and where generated answers end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepstack_pl.language.conversation import IMAGE, TEMPLATES, image_token_id, load_tokenizer, save_tokenizer
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.published.configuration import GENERATE
from deepstack_pl.multimodal.published.files import copy_tokenizer, find_tokenizer, read_json, write_json

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEPT = "published_tokenizer"  # the checkpoint's own tokenizer files, for the way back
_SETTINGS = "tokenizer_config.json"
_NO_SETTINGS = frozenset({*TOKEN_IDS, "use_cache", "transformers_version", "_from_model_config"})


def keep_tokenizer(origin: Path, given: str | None, folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer with ``<image>``, saved into ``folder``, its own files kept beside it."""
    place = find_tokenizer(origin, given)
    if place is None:
        return None
    kept = folder / _KEPT
    copy_tokenizer(place, kept)  # away from a config.json whose model_type transformers does not know
    try:
        words = load_tokenizer(str(kept))
    except ValueError as error:
        raise ValueError(str(error).replace(str(kept), str(place))) from error
    save_tokenizer(words, folder)
    return words


def check_vocabulary(words: PreTrainedTokenizerFast, size: int) -> None:
    """Refuse a tokenizer of another model: one that writes ids that have no embedding.

    Raises:
        ValueError: naming such a token; ``<image>`` alone needs no embedding.
    """
    beyond = sorted((token_id, token) for token, token_id in words.get_vocab().items() if token_id >= size)
    beyond = [(token_id, token) for token_id, token in beyond if token != IMAGE]
    if beyond:
        token_id, token = beyond[0]
        raise ValueError(
            f"The tokenizer has {len(beyond)} tokens beyond vocab_size={size} of config.json, the first being "
            f"{token!r} ({token_id}): it is another model's. Give this model's own (--tokenizer)."
        )


def settings_left_behind(origin: Path, published: Mapping[str, Any]) -> list[str]:
    """Settings of generate that the checkpoint says, and that `generation_settings` does not take over."""
    said = read_json(origin / GENERATION) if (origin / GENERATION).is_file() else {}
    names = {*(said.keys() - _NO_SETTINGS), *(published.keys() & GENERATE)}
    return sorted(name for name in names if said.get(name, published.get(name)) is not None)


def generation_settings(
    origin: Path, config: DeepStackConfig, words: PreTrainedTokenizerFast | None
) -> GenerationConfig:
    """Where answers end; sampling settings of an old generation_config.json are left behind.

    Raises:
        ValueError: the template's marks are no tokens of the tokenizer.
    """
    text, template = config.text_config, TEMPLATES[config.template]
    said = read_json(origin / GENERATION) if (origin / GENERATION).is_file() else {}
    bos, eos, pad = (
        said.get(key, value)
        for key, value in zip(TOKEN_IDS, (text.bos_token_id, text.eos_token_id, text.pad_token_id), strict=True)
    )
    ends = eos if isinstance(eos, list) else [eos]
    if words is not None:
        ids = {mark: words.convert_tokens_to_ids(mark) for mark in template.marks}
        unknown = [mark for mark in ids if mark not in words.get_vocab()]
        if unknown:
            raise ValueError(
                f"Template {template.name!r} is written with {', '.join(unknown)}, which the tokenizer does not have. "
                f"Name the template of this model (--template: {', '.join(sorted(TEMPLATES))}), or its tokenizer."
            )
        ends = [*ends, *(ids[mark] for mark in ids if mark == template.assistant_suffix)]  # Phi-3's is <|end|>
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    return GenerationConfig(
        bos_token_id=bos,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=pad if pad is not None else next(iter(ends), None),
        use_cache=True,
    )


def tokenizer_back(origin: Path, folder: Path) -> str:
    """Write the tokenizer as the published code wants it, and say what was done.

    ``<image>`` goes where it was added, as the last token: published code finds it in the text by itself, and would
    enlarge the embeddings for one more token.
    """
    if (origin / _KEPT).is_dir():
        copy_tokenizer(origin / _KEPT, folder)
        return "tokenizer: the files that the published checkpoint came with"
    if find_tokenizer(origin, None) is None:
        return "tokenizer: none; the published code needs one"
    copy_tokenizer(origin, folder)
    words = load_tokenizer(str(origin))
    added = image_token_id(words) == len(words) - 1
    if added:
        _leave_out_image(folder)
    return (
        f"tokenizer: this model's own files{', without <image>' if added else ''}; the published code reads a slow "
        "tokenizer (tokenizer.model): put the language model's own files in their place"
    )


def _leave_out_image(folder: Path) -> None:
    words, settings = folder / "tokenizer.json", folder / _SETTINGS
    values = read_json(words)
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE]
    write_json(words, values)
    values = read_json(settings)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(values.get(key), list):
            values[key] = [token for token in values[key] if token != IMAGE]
    write_json(settings, values)
