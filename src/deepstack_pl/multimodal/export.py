"""A finished run as a folder that plain `transformers` loads, proven before it is given its name."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from deepstack_pl.language.ends import stop_ids
from deepstack_pl.multimodal.card import Origin, card
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.lora import merge_adapters
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.multimodal.proof import Probe, Proof, prove, same, stored_whole
from deepstack_pl.multimodal.published.files import CONFIG, read_json, whole_or_nothing
from deepstack_pl.multimodal.tensor_files import TensorFiles

CARD = "README.md"
# By how much of the largest logit a model may differ from the run's: not at all as it is; by rounding where adapters
# were added to the weights; by what eight bits of mantissa do over some thirty layers where it was cast to bfloat16.
_MERGED, _CAST = 1e-4, 1e-1


def export(
    source: Path,
    destination: Path,
    *,
    merge: bool,
    dtype: torch.dtype | None,
    origin: Origin,
    report: Callable[[str], None] = print,
) -> list[Proof]:
    """Write the model in the folder ``source`` to the new folder ``destination``, and prove it there.

    Args:
        merge: add adapters to the weights that they stand beside.
        dtype: of the weights; None: as they are.
        origin: what the folder's README.md tells of where it comes from.
        report: takes the lines that tell what was written.

    Raises:
        ValueError: there is no model of ours, or what was written is not it; nothing is left at ``destination`` then.
    """
    require_model(source, merge)
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{destination} lies in {source}, which is only read. Name a folder beside it.")
    with whole_or_nothing(destination) as folder:
        model = DeepStackForConditionalGeneration.from_pretrained(source).eval()
        processor = DeepStackProcessor.from_pretrained(source)
        probe, stored = Probe.of(processor), model.dtype
        kept, proofs = dtype or stored, list[Proof]()
        if merge or kept is not stored:  # what is written is measured against the run's own weights in float32
            del model
            model = DeepStackForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
        run = probe.logits(model)
        if merge:
            merge_adapters(model)
            model.config.lora = {}
            proofs.append(same("merged = unmerged, in float32", probe.logits(model), run, _MERGED))
        for parameter in model.parameters():  # not the buffers: loading makes them anew
            parameter.data = parameter.data.to(kept)
        model.generation_config = _settings(model, processor)
        model.save_pretrained(folder, max_shard_size="5GB")
        DeepStackProcessor.from_pretrained(source).save_pretrained(folder)  # the probe's own takes any length
        proofs.append(stored_whole(folder, model))
        config = model.config
        del model  # the next one needs the room
        proofs += prove(folder, probe, run, _tolerance(merge, stored, kept))
        (folder / CARD).write_text(card(config, origin, proofs), encoding="utf-8")
        tensors = len(TensorFiles(folder))
    report(
        f"written to {destination}: {tensors} tensors, {str(kept).removeprefix('torch.')}, plan {config.plan['name']}"
    )
    return proofs


def require_model(source: Path, merge: bool) -> None:
    """Refuse what cannot be exported before anything is loaded.

    Raises:
        ValueError: ``source`` holds no model of ours, or no adapters to merge.
    """
    kind = read_json(source / CONFIG).get("model_type")
    if kind != DeepStackConfig.model_type:
        raise ValueError(
            f"{source} is a {kind!r}, not a model of this project ({DeepStackConfig.model_type}). One of a published "
            f"DeepStack checkpoint becomes that with `deepstack convert {source} FOLDER`."
        )
    TensorFiles(source)
    if merge and not DeepStackConfig.from_pretrained(source).lora:
        raise ValueError(f"{source} holds no adapters: there is nothing to merge. Leave --merge-lora out.")


def _settings(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> GenerationConfig:
    """Greedy, ending where the template's answers end, so that a plain ``generate`` stops."""
    text, words = model.config.text_config, processor.tokenizer
    ends = stop_ids(words, processor.template)
    pad = words.pad_token_id if isinstance(words.pad_token_id, int) else next(iter(ends), None)
    return GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=ends or None, pad_token_id=pad, use_cache=True)


def _tolerance(merge: bool, stored: torch.dtype, kept: torch.dtype) -> float:
    if kept is not torch.float32 and (merge or kept is not stored):
        return _CAST
    return _MERGED if merge else 0.0
