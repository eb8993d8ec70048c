"""A Qwen3-VL checkpoint as a start: its tower, mergers and LLM under the plan ``qwen3_style``, tensors byte for byte.

What differs here, and is reported: views are square and of one size, positions in the text count on through an image
(there they have three axes), and the text around an image is the template's. So the injected layer inputs are
Qwen3-VL's own for the same embeddings and positions, while its answers are not promised: train from it.
"""

from collections.abc import Callable, Mapping
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_vl import Qwen3VLConfig

from deepstack_pl.language.conversation import image_token_id
from deepstack_pl.multimodal.config import ProjectorKind, Sharing
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.published.files import CONFIG, PIXELS, checkpoint_folder, read_json, whole_or_nothing
from deepstack_pl.multimodal.published.text import check_vocabulary, generation_settings, keep_tokenizer
from deepstack_pl.multimodal.strict import check_tensors, own_shapes
from deepstack_pl.multimodal.tensor_files import TensorFiles, size_of, write_tensors
from deepstack_pl.stacking.config import ModelConfig, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import QWEN3_VL, VisionConfig, VisionInit, VisionLibrary

MODEL_TYPE = "qwen3_vl"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
TEMPLATE = "qwen3"
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias"),
    *("attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_PREFIXES = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
_TOWER, _MERGER, _TAPS = "vision_tower.tower.", "projector.", "own_projectors.tap_"


def convert_qwen3_vl(
    source: str,
    destination: str | Path,
    *,
    image_size: int | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Write the Qwen3-VL checkpoint ``source`` to the new folder ``destination``, for `from_pretrained` and init_from.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        image_size: side of a view, pixels; the side that the tower's learned positions cover where it is not given.
        tokenizer: a tokenizer, where the checkpoint holds none.
        template: a conversation template.
        report: takes the lines that tell what was done.

    Raises:
        ValueError: anything is missing, left over or unknown; nothing is left at ``destination`` then.
    """
    with whole_or_nothing(Path(destination)) as folder:
        origin = checkpoint_folder(source)
        theirs = AutoConfig.from_pretrained(origin)
        assert isinstance(theirs, Qwen3VLConfig), "whoever calls looks at model_type"
        words = keep_tokenizer(origin, tokenizer, folder)
        config = read_qwen3_vl(theirs, _pixels(origin), image_size=image_size, template=template, words=words)
        if words is not None:
            check_vocabulary(words, config.text_config.vocab_size)
        settings = generation_settings(origin, config, words)
        files, shapes = TensorFiles(origin), own_shapes(config)
        names = {theirs_of(ours): ours for ours in shapes}
        spare = _spare_head(config, files)
        found = {name: name for name in files if name not in spare}
        check_tensors({name: shapes[ours] for name, ours in names.items()}, files, found, source, spare)
        own = {ours: name for name, ours in names.items()}

        def load(ours: str) -> Tensor:
            return files[own[ours]]

        write_tensors(folder, {ours: size_of(shapes[ours], files.dtype(name)) for ours, name in own.items()}, load)
        dtypes = {files.dtype(name) for name in files}
        if len(dtypes) == 1:
            config.dtype = next(iter(dtypes))
        config.architectures = [DeepStackForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        settings.save_pretrained(folder)
    plan, vision = config.typed_plan(), config.typed_vision()
    report(f"read {source}: {MODEL_TYPE}, {len(files)} tensors, {plan.llm_layers} layers")
    report(plan.draw())
    taken = (vision.patches_per_side // plan.pooling) ** 2
    report(f"a view is {vision.image_size} pixels, {taken} positions in the text; Qwen3-VL keeps an image's own shape")
    report("positions count on through an image; Qwen3-VL's have three axes: train from this, it is a start")
    taps = ",".join(map(str, plan.taps))
    report(
        f"written to {destination}\n"
        f"train from it: python train.py init_from={destination} model=qwen3_style 'model.taps=[{taps}]' "
        f"model.groups={len(plan.taps)} model.pooling={plan.pooling} projector=patch_merger llm=... vision=...\n"
        "               (options that describe this language model and tower; experiment=qwen3_vl_8b has the 8B's)"
    )


def read_qwen3_vl(
    theirs: Qwen3VLConfig,
    pixels: Mapping[str, Any],
    *,
    image_size: int | None,
    template: str | None,
    words: PreTrainedTokenizerFast | None,
) -> DeepStackConfig:
    """Our configuration of a Qwen3-VL, but for what is said above.

    Raises:
        ValueError: values without a counterpart here.
    """
    text: Any = theirs.text_config
    vision: Any = theirs.vision_config
    rope = dict(text.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{CONFIG}: rope_type={rope['rope_type']!r} of the text model is not known here, only 'default'. Such a "
            "checkpoint cannot be converted."
        )
    grid, merge = isqrt(vision.num_position_embeddings), vision.spatial_merge_size
    if grid**2 != vision.num_position_embeddings:
        raise ValueError(
            f"{CONFIG}: num_position_embeddings={vision.num_position_embeddings} of the tower is no square. Correct it."
        )
    if vision.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{CONFIG}: hidden_act={vision.hidden_act!r} of the tower is none of {', '.join(ACTIVATIONS)}. Such a "
            "checkpoint cannot be converted."
        )
    indexes = list(vision.deepstack_visual_indexes)
    if indexes != sorted(set(indexes)):
        raise ValueError(
            f"{CONFIG}: deepstack_visual_indexes={indexes} do not ascend. transformers injects taps in the order of "
            "blocks, with mergers in the order of the list: such a checkpoint cannot be converted."
        )
    size = grid * vision.patch_size if image_size is None else image_size
    if size < 1 or size % (vision.patch_size * merge):
        raise ValueError(
            f"--image-size {size}: squares of {merge}x{merge} patches of {vision.patch_size} pixels must cover a view. "
            f"Give a multiple of {vision.patch_size * merge}."
        )
    others = {key: getattr(vision, key) for key in ("num_position_embeddings", "temporal_patch_size", "in_channels")}
    tower = VisionConfig(
        name=MODEL_TYPE,
        library=VisionLibrary.huggingface,
        family=QWEN3_VL,
        init=VisionInit.random,
        image_size=size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.depth,
        heads=vision.num_heads,
        mlp_ratio=ceil(vision.intermediate_size / vision.hidden_size * 1e4) / 1e4,  # as conf writes it
        quick_gelu=vision.hidden_act == "quick_gelu",
        gelu_tanh=vision.hidden_act == "gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        architecture={key: value for key, value in others.items() if value != getattr(vision.__class__(), key)},
        feature_layer=-1,
        mean=list(pixels["image_mean"]),
        std=list(pixels["image_std"]),
    )
    taps = [index + 1 for index in indexes]  # "after block i" is hidden state i + 1
    stacked = ModelConfig(
        name="qwen3_style",
        tiles=0,
        pooling=merge,
        taps=taps,
        source=Source.tap if taps else Source.tiles,
        start_layer=1,  # "after layer 0" is before layer 1
        groups=len(taps),
    )
    values: dict[str, Any] = {key: text.to_dict().get(key) for key in _TEXT}
    host = Qwen3Config(
        **values,
        tie_word_embeddings=theirs.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]},
    )
    return DeepStackConfig(
        text_config=host,
        vision=vision_values(tower),
        projector=ProjectorKind.patch_merger.value,
        projector_sharing=Sharing.shared.value,
        plan=Plan.build(stacked, llm_layers=host.num_hidden_layers, vit_layers=vision.depth).to_dict(),
        template=template or TEMPLATE,
        image_token_id=theirs.image_token_id if words is None else image_token_id(words),
        sample_max_length=min(host.max_position_embeddings, 32768),
    )


def theirs_of(ours: str) -> str:
    """The name that Qwen3-VL gives to one of our tensors."""
    for prefix, other in _PREFIXES.items():
        if ours.startswith(prefix):
            return other + ours.removeprefix(prefix)
    if ours.startswith(_TAPS):
        return f"model.visual.deepstack_merger_list.{ours.removeprefix(_TAPS)}"
    if ours.startswith(_MERGER):
        return f"model.visual.merger.{ours.removeprefix(_MERGER)}"
    assert ours.startswith(_TOWER), ours
    return f"model.visual.{ours.removeprefix(_TOWER)}"


def _pixels(origin: Path) -> dict[str, Any]:
    """Mean and deviation of pixels; the checkpoint says them."""
    values = read_json(origin / PIXELS)
    for key in ("image_mean", "image_std"):
        if not (isinstance(said := values.get(key), list) and len(said) == 3):
            raise ValueError(
                f"{origin / PIXELS}: {key}={values.get(key)!r} is no list of three numbers. Fetch the checkpoint again."
            )
    return values


def _spare_head(config: DeepStackConfig, files: TensorFiles) -> list[str]:
    """The head that a tied checkpoint stores beside the embeddings, if it is the same."""
    head, embeddings = "lm_head.weight", "model.language_model.embed_tokens.weight"
    if not config.text_config.tie_word_embeddings or head not in files or embeddings not in files:
        return []
    return [head] if torch.equal(files[head], files[embeddings]) else []
