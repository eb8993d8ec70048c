"""A published checkpoint's config.json to a `DeepStackConfig`, and back (method A.6, F).

Nothing is ignored in silence: a value without a meaning here is refused by name, and keys that nobody reads are listed
(`unread_keys`) and kept in ``DeepStackConfig.published``, from which the way back starts.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from deepstack_pl.language.config import TooLong
from deepstack_pl.language.template import TEMPLATES
from deepstack_pl.multimodal.config import ProjectorKind, Sharing, check_pooling
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.published.host import host_keys, host_of, read_host, same_host, write_host
from deepstack_pl.multimodal.published.saying import published_values
from deepstack_pl.multimodal.published.tower import known_tower, read_tower
from deepstack_pl.multimodal.published.words import PLAN_KEYS, published_plan, vit_start
from deepstack_pl.stacking.config import Host
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig, VisionLibrary

POST_ENCODER = 5  # layers that the published code appends to a tower whose stack begins at its end (method B.5)
NEVER_CUT = 2**31 - 1  # positions: the published code cuts nothing where tokenizer_model_max_length is not said
TOWER_FOLDER = "vision_tower"  # where a tower that has no public name is described, inside a published folder

_READ = (
    "model_type",
    "mm_vision_tower",
    "mm_hidden_size",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_resampler_type",
    "mm_use_im_start_end",
    "tokenizer_model_max_length",
    *PLAN_KEYS,
)
# Settings of generate, which transformers 4 kept in every config.json.
GENERATE = frozenset(
    word
    for line in (
        "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty",
        "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids",
        "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate",
        "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty",
        "suppress_tokens begin_suppress_tokens",
    )
    for word in line.split()
)
# Of training, of the published loader, or of transformers 4's base class: no bearing on what the model computes.
_IRRELEVANT = GENERATE | frozenset(
    word
    for line in (
        "_name_or_path architectures auto_map transformers_version hires use_mm_proj mm_patch_merge_type",
        "mm_use_im_patch_token image_crop_resolution image_split_resolution image_grid_pinpoints",
        "tokenizer_padding_side freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter",
        "tune_mm_vision_resampler unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr",
        "return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads",
        "chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention",
        "tie_encoder_decoder id2label label2id finetuning_task tokenizer_class prefix sep_token_id problem_type",
        "decoder_start_token_id task_specific_params _attn_implementation",
    )
    for word in line.split()
)
_PROJECTORS = (ProjectorKind.linear.value, ProjectorKind.mlp2x_gelu.value)


def read_config(
    published: Mapping[str, Any],
    tower: Mapping[str, Any] | None,
    pixels: Mapping[str, Any] | None,
    *,
    template: str | None = None,
    image_token_id: int = -200,
) -> DeepStackConfig:
    """This project's configuration of a published one.

    Args:
        published: a config.json with ``model_type`` deepstack_llama or deepstack_phi.
        tower: the vision tower's own CLIP configuration; None where ``mm_vision_tower`` is one of OpenAI's.
        pixels: the tower's preprocessor_config.json; None means CLIP's mean and deviation.
        template: name of a conversation template; None takes the host's.

    Raises:
        ValueError: a value that has no meaning here, or one that the published code could not run.
    """
    host, text = host_of(published), read_host(published)
    template = template or host.template
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r}: no such template. There are {', '.join(sorted(TEMPLATES))}.")
    _refuse_unknown_parts(published)
    vision = _vision(published, tower, pixels)
    try:
        plan = published_plan(published, llm_layers=text.num_hidden_layers, vision=vision)
        check_pooling(plan, vision)
    except ValueError as error:
        raise ValueError(f"config.json says no plan that can be: {error}") from error
    sharing = Sharing.global_and_tiles if published.get("twoviews_unshare") else Sharing.shared
    return DeepStackConfig(
        text_config=text,
        vision=vision_values(vision),
        projector=_projector(published).value,
        projector_sharing=sharing.value,
        plan=plan.to_dict(),
        template=template,
        image_token_id=image_token_id,
        sample_max_length=_longest(published),
        sample_too_long=TooLong.cut.value,
        published=deepcopy(dict(published)),
        dtype=text.dtype,
    )


def unread_keys(published: Mapping[str, Any]) -> list[str]:
    """Keys that neither bear on the model as far as is known, nor are read."""
    read = {*_READ, *_IRRELEVANT, *host_keys(host_of(published))}
    return sorted(published.keys() - read)


def write_config(config: DeepStackConfig) -> dict[str, Any]:
    """The published config.json of ``config``: the one it came from, in which only what differs is written anew.

    Raises:
        ValueError: the published code cannot say it; the sentence names what.
    """
    vision, plan = config.typed_vision(), config.typed_plan()
    if config.projector not in _PROJECTORS or config.projector_sharing == Sharing.per_injection.value:
        raise ValueError(
            f"projector.kind={config.projector}, projector.sharing={config.projector_sharing}: projectors there are "
            f"{' and '.join(_PROJECTORS)}, one for all. Keep this model in this project's format."
        )
    if vision.library is not VisionLibrary.open_clip or vision.family or vision.gelu_tanh:
        raise ValueError(
            f"vision={vision.name}: towers there are CLIP's with GELU or quick GELU, and written from open_clip's own "
            "transformer alone. Keep this model in this project's format."
        )
    fresh = {
        "host": write_host(config.text_config),
        "plan": published_values(plan, vision),
        "model": _model_values(config),
    }
    fresh["host"]["torch_dtype"] = config.to_dict()["dtype"]
    fresh["plan"]["twoviews_unshare"] = Sharing(config.projector_sharing) is not Sharing.shared
    if config.published is None:
        return {**fresh["host"], **fresh["model"], **fresh["plan"], "unfreeze_mm_vision_tower": True}
    written = deepcopy(config.published)
    if not same_host(written, config.text_config):
        written |= fresh["host"]
    if _sharing_and_digest(written, plan, vision) != (fresh["plan"]["twoviews_unshare"], plan.digest):
        written |= fresh["plan"]
    if vit_start(written) is None or not post_encoder_layers(config):
        _replace(written, fresh["model"], "mm_vision_select_layer", _tap(written, vision), vision.tap)
    _replace(written, fresh["model"], "mm_projector_type", _projector(written).value, config.projector)
    _replace(written, fresh["model"], "tokenizer_model_max_length", _longest(written), config.sample_max_length)
    if written.get("torch_dtype") is not None:
        written["torch_dtype"] = fresh["host"]["torch_dtype"]
    return written


def post_encoder_layers(config: DeepStackConfig) -> int:
    """Layers of the tower that the published format keeps apart: appended ones, behind the stack's start.

    A stack that starts five layers before the end of a tower read at its very end is one: the published tower is five
    layers shorter. A tower that really is as long says its last state by a positive ``feature_layer``.
    """
    layers, plan = config.vision["layers"], config.typed_plan()
    start = min((i.layer for i in plan.injections if i.host is Host.vit), default=None)
    appended = start == layers - POST_ENCODER and config.vision["feature_layer"] == -1
    return POST_ENCODER if appended else 0


def _vision(
    published: Mapping[str, Any], tower: Mapping[str, Any] | None, pixels: Mapping[str, Any] | None
) -> VisionConfig:
    name = published.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ValueError(f"mm_vision_tower={name!r} names no vision tower. A DeepStack checkpoint has one: correct it.")
    layer = _select_layer(published)
    plain = read_tower(name, tower, pixels, feature_layer=0)
    if published.get("mm_hidden_size", plain.width) != plain.width:
        raise ValueError(
            f"mm_hidden_size={published['mm_hidden_size']}, but the tower {name!r} is {plain.width} wide: it is not "
            "the one this checkpoint was trained with. Give the right one (--vision-tower)."
        )
    start = vit_start(published)
    if start is not None and start > plain.layers:
        raise ValueError(
            f"lsvit_start_layer_{start}: the tower {name!r} has {plain.layers} layers; a stack starts before one of "
            f"them, or at {plain.layers}, in layers of its own. Correct deepstack_args_for_ablation."
        )
    if start == plain.layers:
        return read_tower(name, tower, pixels, feature_layer=-1, layers=plain.layers + POST_ENCODER)
    vision = read_tower(name, tower, pixels, feature_layer=layer)
    if layer == -1 and start == vision.layers - POST_ENCODER:
        vision.feature_layer = vision.layers  # the same state; -1 would mean appended layers (`post_encoder_layers`)
    return vision


def _select_layer(published: Mapping[str, Any]) -> int:
    layer = published.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(
            f"mm_vision_select_layer={layer!r} is no whole number: it says which of the tower's states is read (-2: "
            "the last layer's input). Correct config.json."
        )
    return layer


def _tap(published: Mapping[str, Any], vision: VisionConfig) -> int:
    layer = _select_layer(published)
    return layer if layer >= 0 else vision.layers + 1 + layer


def _longest(published: Mapping[str, Any]) -> int:
    """Positions of a sample before it is cut."""
    length = published.get("tokenizer_model_max_length")
    if length is None:
        return NEVER_CUT
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(
            f"tokenizer_model_max_length={length!r} is no whole number above 0: samples are cut at that many positions."
            " Correct config.json, or remove it if none was cut."
        )
    return length


def _projector(published: Mapping[str, Any]) -> ProjectorKind:
    name = published.get("mm_projector_type", "linear")  # as the published code takes a missing one
    if not isinstance(name, str) or name not in _PROJECTORS:
        raise ValueError(
            f"mm_projector_type={name!r}: published projectors are {' and '.join(_PROJECTORS)}. A checkpoint with "
            "another one cannot be converted."
        )
    return ProjectorKind(name)


def _refuse_unknown_parts(published: Mapping[str, Any]) -> None:
    """Values that would change what the model sees, and that have no counterpart here."""
    wanted = {
        "mm_vision_select_feature": ("patch", "the class token never reaches the language model"),
        "mm_resampler_type": (None, "there is no resampler between tower and projector"),
        "mm_use_im_start_end": (False, "prompts put no marks around an image"),
    }
    for key, (value, rule) in wanted.items():
        if published.get(key, value) != value:
            raise ValueError(
                f"{key}={published[key]!r}: here it can only be {value!r}, as {rule}. Such a checkpoint cannot be "
                "converted."
            )


def _model_values(config: DeepStackConfig) -> dict[str, Any]:
    """Tower, projector and lengths, as published configs say them."""
    vision, appended = config.typed_vision(), post_encoder_layers(config)
    return {
        "mm_vision_tower": known_tower(vision, vision.layers - appended) or TOWER_FOLDER,
        "mm_hidden_size": vision.width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": -2 if appended else vision.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "tokenizer_model_max_length": None if config.sample_max_length >= NEVER_CUT else config.sample_max_length,
        "tokenizer_padding_side": "right",
        "transformers_version": "4.39.3",  # the published code's
    }


def _sharing_and_digest(published: Mapping[str, Any], plan: Plan, vision: VisionConfig) -> tuple[bool, str]:
    said = published_plan(published, llm_layers=plan.llm_layers, vision=vision)
    return bool(published.get("twoviews_unshare", False)), said.digest


def _replace(written: dict[str, Any], fresh: Mapping[str, Any], key: str, said: Any, meant: Any) -> None:
    if said != meant:
        written[key] = fresh[key]
