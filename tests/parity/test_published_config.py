"""What a published config.json says: plan, tower and host, there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replica import TOWER_NAME, Replica
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deepstack_pl.language.config import TooLong
from deepstack_pl.multimodal.config import Sharing
from deepstack_pl.multimodal.configuration import DeepStackConfig, vision_values
from deepstack_pl.multimodal.published.configuration import (
    NEVER_CUT,
    post_encoder_layers,
    read_config,
    unread_keys,
    write_config,
)
from deepstack_pl.multimodal.published.words import PLAN_KEYS, crashing_words
from deepstack_pl.stacking.config import (
    Dealing,
    Encoding,
    GridRule,
    Host,
    InjectionConfig,
    ModelConfig,
    Newline,
    Operator,
    Order,
    Overflow,
    Resize,
    Sequence,
    Source,
    Unfilled,
)
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig

GOLDEN = Path(__file__).parents[1] / "golden"
L = Replica(layers=8, tower_layers=6)
PIXELS = json.loads((GOLDEN / "vision_tower" / "preprocessor_config.json").read_text())


def read(
    replica: Replica = L, tower: dict | None = None, pixels: dict | None = None, **changes: Any
) -> DeepStackConfig:
    return read_config({**replica.config(), **changes}, replica.tower() if tower is None else tower, pixels)


def plan(config: DeepStackConfig) -> Plan:
    return config.typed_plan()


def text(config: DeepStackConfig) -> PreTrainedConfig:
    return config.text_config


def words(*said: str) -> dict[str, str]:
    return {"deepstack_args_for_ablation": "+".join(said)}


DROP = {"overflow": Overflow.drop}
BLANK = {"sequence": Sequence.blank}
SQUARE = {"grid": GridRule.square}
HD = {"is_anyres_deepstack": True, "mm_patch_merge_type": "spatial_unpad"}
VIT = {"host": Host.vit, **SQUARE}
# What is published, and the same as this project says it: the table of the ablations (method A.6, A.7, B).
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "null words": ({"deepstack_args_for_ablation": None}, {}),
    "defaults": ({"deepstack_start_id": 1, "deepstack_interval": 1, **words(""), "deepstack_sampling": "2d"}, {}),
    "start and interval": ({"deepstack_start_id": 2, "deepstack_interval": 2}, {"start_layer": 2, "interval": 2}),
    "start 0": ({"deepstack_start_id": 0}, {"start_layer": 0}),
    "crops": ({"num_crops": 6}, {"tiles": 6, "groups": 6}),
    "2xsample": (words("2xsample"), SQUARE),
    "2xsample of 5": ({**words("2xsample"), "num_crops": 5}, {**SQUARE, "tiles": 5, "groups": 4}),
    "1d": ({"deepstack_sampling": "1d"}, {"dealing": Dealing.strided_1d}),
    "grid": ({"deepstack_sampling": "grid"}, {"dealing": Dealing.tiles}),
    "2d_scaledown": ({"deepstack_sampling": "2d_scaledown"}, {"pooling": 2}),
    "dummy_local": (words("dummy_local"), {"source": Source.global_view}),
    "only_global_features": (
        {**words("only_global_features"), "deepstack_start_id": 5},
        {**BLANK, "source": Source.global_view, "groups": 1, "start_layer": 5},
    ),
    "global_and_local": (
        {**words("global_and_local"), "deepstack_interval": 2},
        {
            **BLANK,
            "start_layer": 3,
            "interval": 2,
            "injections": [InjectionConfig(source=Source.global_view, layer=1)],
        },
    ),
    "string_woglobal": (
        words("string_woglobal"),
        {"sequence": Sequence.tiles, "unfilled": Unfilled.zeros, "groups": 0},
    ),
    "string_withglobal": (
        words("string_withglobal"),
        {"sequence": Sequence.global_and_tiles, "unfilled": Unfilled.zeros, "groups": 0},
    ),
    "inconsistent": (words("inconsistent"), {"resize": Resize.letterbox}),
    "anyres_unpad": (words("anyres_unpad"), {"resize": Resize.letterbox}),
    "hires_local": (words("hires_local"), {"encoding": Encoding.one_pass, **SQUARE}),
    "deepstack_vit": (words("2xsample", "deepstack_vit", "lsvit_start_layer_1"), VIT),
    "deepstack_vit, one dropped": (
        words("lsvit_start_layer_3", "deepstack_vit", "2xsample"),
        {**VIT, "start_layer": 3},
    ),
    "scaledown_clip": (
        words("2xsample", "deepstack_vit", "lsvit_start_layer_1", "scaledown_clip"),
        {**VIT, "pooling": 2},
    ),
    "hd": (
        HD,
        {
            "detail": 2,
            "source": Source.detail,
            "sequence": Sequence.global_and_tiles,
            "order": Order.raster,
            "newline": Newline.rows_and_groups,
        },
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_published_words_are_this_plan(name: str) -> None:
    published, values = SAID[name]
    expected = Plan.build(ModelConfig(name="expected", **DROP, **values), llm_layers=8, vit_layers=5)
    found = plan(read(**published))
    assert replace(found, name="expected") == expected
    assert found.digest == expected.digest


@pytest.mark.parametrize("name", SAID)
def test_a_config_goes_back_as_it_was_and_anew(name: str) -> None:
    config = read(**SAID[name][0])
    assert write_config(config) == config.published
    config.published = None
    written = write_config(config)
    assert {*PLAN_KEYS} <= written.keys()
    again = read_config(written, L.tower(), None)
    assert plan(again).digest == plan(config).digest
    assert (text(again).to_dict(), again.vision) == (text(config).to_dict(), {**config.vision, "name": "vision_tower"})
    assert (again.projector, again.sample_max_length) == (config.projector, config.sample_max_length)


@pytest.mark.parametrize("case", sorted(folder.name for folder in (GOLDEN / "cases").iterdir()))
def test_golden_configs_are_read_whole_and_go_back_as_they_were(case: str) -> None:
    published = json.loads((GOLDEN / "cases" / case / "config.json").read_text())
    tower = json.loads((GOLDEN / "vision_tower" / "config.json").read_text())
    config = read_config(published, tower, PIXELS)
    assert unread_keys(published) == []
    assert write_config(config) == published
    assert config.sample_max_length == published["tokenizer_model_max_length"]
    assert config.sample_too_long == TooLong.cut.value


def test_a_config_without_deepstack_keys_starts_at_1_with_interval_1() -> None:
    published = {key: value for key, value in L.config().items() if key != "num_crops"}
    injections = plan(read_config(published, L.tower(), None)).injections
    assert [(i.layer, i.group) for i in injections] == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_injections_beyond_the_depth_are_dropped_as_published() -> None:
    found = plan(read(deepstack_start_id=6))
    assert [i.layer for i in found.injections] == [6, 7]
    assert [i.layer for i in found.dropped] == [8, 9]


def test_what_the_published_code_crashes_on_is_known() -> None:
    assert crashing_words({**words("hires_local"), "twoviews_unshare": True}) == ["hires_local", "twoviews_unshare"]
    assert crashing_words({"deepstack_sampling": "2d_scaledown"}) == ["2d_scaledown"]
    assert crashing_words(L.config()) == []


def test_unshared_views_are_two_projectors() -> None:
    assert Sharing(read(twoviews_unshare=True).projector_sharing) is Sharing.global_and_tiles
    assert write_config(read(twoviews_unshare=True))["twoviews_unshare"] is True


# What is refused, and by which words.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt word": (words("dumy_local"), "no word 'dumy_local' and would ignore it in silence"),
    "a start without a number": (words("lsvit_start_layer_x"), "no word 'lsvit_start_layer_x'"),
    "words that are no text": ({"deepstack_args_for_ablation": ["2xsample"]}, "is no text"),
    "two layouts": (words("dummy_local", "string_woglobal"), "dummy_local and string_woglobal each say"),
    "words with hd": ({**HD, **words("string_woglobal")}, "is_anyres_deepstack with"),
    "another dealing with hd": ({**HD, "deepstack_sampling": "1d"}, "is_anyres_deepstack with"),
    "hd of too few crops": ({**HD, "num_crops": 3}, r"num_crops=3 with is_anyres_deepstack: .*u = floor\(sqrt"),
    "an interval of nothing": ({"deepstack_interval": 0}, "deepstack_interval=0: it is at least 1"),
    "a start before the first layer": ({"deepstack_start_id": -1}, "deepstack_start_id=-1: it is at least 0"),
    "a length of nothing": ({"tokenizer_model_max_length": 0}, "tokenizer_model_max_length=0 is no whole number"),
    "a length in words": ({"tokenizer_model_max_length": "4"}, "tokenizer_model_max_length='4' is no whole number"),
    "a rotary base of nothing": ({"rope_theta": 0}, "rope_theta=0: the rotary base"),
    "a rotary base in words": ({"rope_theta": "1e4"}, "rope_theta='1e4': the rotary base"),
    "a scaling that is none": ({"rope_scaling": [2.0]}, r"rope_scaling=\[2.0\] is no object"),
    "a list of dealings": ({"deepstack_sampling": ["2d"]}, r"deepstack_sampling=\['2d'\]: published are"),
    "a list of projectors": ({"mm_projector_type": ["linear"]}, r"mm_projector_type=\['linear'\]: published"),
    "a list of models": ({"model_type": ["deepstack_llama"]}, r"model_type=\['deepstack_llama'\]: published"),
    "no heads": ({"num_attention_heads": 0}, "transformers refuses its values for a llama"),
    "the tower without a start": (words("2xsample", "deepstack_vit"), "needs one start, and has none"),
    "the tower with two starts": (
        words("2xsample", "deepstack_vit", "lsvit_start_layer_1", "lsvit_start_layer_2"),
        r"needs one start, and has \[1, 2\]",
    ),
    "the tower without the square": (words("deepstack_vit", "lsvit_start_layer_1"), "Add 2xsample"),
    "the tower dealt 1d": (
        {**words("2xsample", "deepstack_vit", "lsvit_start_layer_1"), "deepstack_sampling": "1d"},
        "leave deepstack_sampling at 2d",
    ),
    "the tower in one pass": (
        words("2xsample", "deepstack_vit", "lsvit_start_layer_1", "hires_local"),
        "says no plan that can be: .*never sees tiles by themselves",
    ),
    "a start without the tower": (words("lsvit_start_layer_1"), "is read with deepstack_vit alone"),
    "a start beyond the tower": (
        words("2xsample", "deepstack_vit", "lsvit_start_layer_7"),
        "lsvit_start_layer_7: the tower 'tiny-clip' has 6 layers",
    ),
    "pooling with a stack": (words("scaledown_clip"), "spill onto the text"),
    "a string of groups that are never filled": (
        {**words("2xsample", "string_woglobal"), "num_crops": 5},
        "fills 4 of the 5 groups",
    ),
    "a sampling": ({"deepstack_sampling": "3d"}, "deepstack_sampling='3d': published are 2d, 1d, grid, 2d_scaledown"),
    "an aspect ratio": ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad': only 'deepstack'"),
    "more crops than there is memory for": (
        {"num_crops": 2**31},
        r"model\.tiles=2147483648: an image becomes at most 1,024",
    ),
    "one crop": ({"num_crops": 1}, "says no plan that can be"),
    "crops that are no number": ({"num_crops": "4"}, "num_crops='4' is no whole number"),
    "a negative start": ({"deepstack_start_id": -1}, "says no plan that can be"),
    "an interval of 0": ({"deepstack_interval": 0}, "says no plan that can be"),
    "another host": ({"model_type": "deepstack_mpt"}, "model_type='deepstack_mpt'"),
    "another projector": ({"mm_projector_type": "mlp3x_gelu"}, "published projectors are linear and mlp2x_gelu"),
    "the class token": ({"mm_vision_select_feature": "cls_patch"}, "can only be 'patch'"),
    "a resampler": ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'"),
    "marks around images": ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    "no layer": ({"mm_vision_select_layer": None}, "mm_vision_select_layer=None is no whole number"),
    "a layer that is not there": ({"mm_vision_select_layer": -9}, "names no hidden state of a tower of 6 layers"),
    "another width": ({"mm_hidden_size": 1024}, "mm_hidden_size=1024, but the tower 'tiny-clip' is 12 wide"),
    "no tower": ({"mm_vision_tower": None}, "mm_vision_tower=None names no vision tower"),
    "a scaling": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling=.*not 'yarn'"),
    "a dtype": ({"torch_dtype": "bfloat61"}, "torch_dtype='bfloat61'"),
    "a value of another type": ({"hidden_size": "16"}, "transformers refuses its values for a llama: .*hidden_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(name: str) -> None:
    published, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        read(**published)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tiles": 0, "groups": 0}, "has no published words"),
        ({"operator": Operator.gated_add}, "published injections have no gates"),
        ({"groups": 2}, "fewer of them|where the published schedule has none"),
        ({"injections": [InjectionConfig(host=Host.vit, layer=2)]}, "has no published words"),
        ({"groups": 0, "sequence": Sequence.channels}, r"sequence \(channels"),
        ({"groups": 0, "sequence": Sequence.global_and_tiles}, r"unfilled \(leave_out, published zeros\)"),
        (
            {"groups": 0, "sequence": Sequence.tiles, "order": Order.raster},
            r"order \(raster, published by_group\)",
        ),
        ({"groups": 0, "injections": [InjectionConfig(layer=k**2, group=k) for k in range(3)]}, "injections: "),
        ({"detail": 2, "source": Source.detail}, "has no published words"),
        ({"tiles": 8, "groups": 4}, "has no published words"),
    ],
)
def test_a_plan_that_published_words_cannot_say_is_refused(values: dict[str, Any], said: str) -> None:
    config = read()
    config.plan = Plan.build(ModelConfig(name="mine", **values), llm_layers=8, vit_layers=5).to_dict()
    with pytest.raises(ValueError, match=said):
        write_config(config)


@pytest.mark.parametrize(
    ("values", "remedy", "said"),
    [
        ({"host": Host.vit}, {"grid": GridRule.square}, "Train with model.grid=square"),
        ({"tiles": 0, "source": Source.global_view}, {"tiles": 4}, r"set model.tiles=4 "),
        ({"tiles": 0, **BLANK, "source": Source.global_view, "groups": 1}, {"tiles": 4}, r"set model.tiles=4 "),
        ({"tiles": 0, "source": Source.global_view, "groups": 3}, {"tiles": 3}, r"set model.tiles=3 "),
    ],
)
def test_what_would_make_a_plan_sayable_is_named_in_words_of_conf(
    values: dict[str, Any], remedy: dict[str, Any], said: str
) -> None:
    config = read()
    config.plan = Plan.build(ModelConfig(name="mine", **values), llm_layers=8, vit_layers=5).to_dict()
    with pytest.raises(ValueError, match=said) as refused:
        write_config(config)
    assert "2xsample" not in str(refused.value)
    assert "LLaVA" not in str(refused.value)
    config.plan = Plan.build(ModelConfig(name="mine", **values | remedy), llm_layers=8, vit_layers=5).to_dict()
    assert plan(read_config(write_config(config), L.tower(), None)).digest == plan(config).digest


def test_without_a_length_nothing_is_cut_and_none_is_written() -> None:
    config = read(tokenizer_model_max_length=None)
    assert config.sample_max_length == NEVER_CUT
    assert write_config(config)["tokenizer_model_max_length"] is None
    published = {key: value for key, value in L.config().items() if key != "tokenizer_model_max_length"}
    assert write_config(read_config(published, L.tower(), None)) == published
    config.published = None
    assert write_config(config)["tokenizer_model_max_length"] is None


# Towers.
def test_openais_towers_need_no_files() -> None:
    published = {**L.config(), "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    vision = read_config(published, None, None).typed_vision()
    assert vision == VisionConfig(name="openai/clip-vit-large-patch14-336")
    published["mm_vision_tower"] = "openai/clip-vit-large-patch14"
    assert read_config(published, None, None).typed_vision().image_size == 224
    with pytest.raises(ValueError, match="mm_vision_tower='laion/CLIP': its configuration is not at hand"):
        read_config({**published, "mm_vision_tower": "laion/CLIP"}, None, None)


def test_a_known_tower_goes_back_by_its_name_whatever_it_was_called_here() -> None:
    config = read()
    config.published = None
    config.vision = vision_values(VisionConfig(name="clip_l_336"))
    config.plan = Plan.build(ModelConfig(name="l"), llm_layers=8, vit_layers=23).to_dict()
    assert write_config(config)["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"


def test_a_whole_clip_configuration_says_its_tower() -> None:
    whole = {"model_type": "clip", "text_config": {}, "vision_config": {**L.tower(), "hidden_act": "gelu"}}
    vision = read(tower={**whole, "vision_config": {**whole["vision_config"], "layer_norm_eps": 1e-3}}).typed_vision()
    assert (vision.quick_gelu, vision.layer_norm_eps, vision.heads) == (False, 1e-3, 2)
    assert int(vision.width * vision.mlp_ratio) == 20


def test_an_inner_width_survives_the_ratio_it_is_written_as() -> None:
    for width, inner in ((1408, 6144), (1152, 4304), (1280, 5120), (1664, 8192)):
        tower = {**L.tower(), "hidden_size": width, "intermediate_size": inner, "num_attention_heads": 16}
        assert int(width * read(tower=tower, mm_hidden_size=width).vision["mlp_ratio"]) == inner


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "siglip_vision_model"}, "is a 'siglip_vision_model': published towers are CLIP's"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"patch_size": None}, "its config.json says {'patch_size': None}: sizes and depths are whole numbers"),
        ({"num_hidden_layers": 0}, "says {'num_hidden_layers': 0}"),
        ({"hidden_size": "12"}, "transformers refuses its config.json"),
        ({"num_attention_heads": 0}, "transformers refuses its config.json"),
    ],
)
def test_another_tower_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tower={**L.tower(), **change})


def test_pixels_are_the_towers_own() -> None:
    own = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    assert read().vision["mean"] == VisionConfig().mean
    assert read(pixels={**PIXELS, **own, "image_mean": [0.5, 0.5, 0.5]}).vision["mean"] == [0.5, 0.5, 0.5]
    assert read(pixels={"size": 16, "crop_size": 16}).vision["std"] == VisionConfig().std  # as CLIP once wrote it
    for wrong in (
        {"resample": 2},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1.0},
        {"size": {"shortest_edge": 28}},
        {"crop_size": {"height": 14, "width": 14}},
        {"crop_size": []},
        {"rescale_factor": None},
        {"image_mean": None},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
    ):
        with pytest.raises(ValueError, match=f"preprocessor_config.json says {{'{next(iter(wrong))}'"):
            read(pixels={**PIXELS, **own, **wrong})


@pytest.mark.parametrize(("layer", "tap"), [(-2, 5), (-1, 6), (-7, 0), (0, 0), (4, 4)])
def test_the_tower_is_read_where_the_config_says(layer: int, tap: int) -> None:
    config = read(mm_vision_select_layer=layer)
    assert (config.typed_vision().tap, plan(config).vit_layers) == (tap, tap)
    assert write_config(config)["mm_vision_select_layer"] == layer


def test_a_stack_at_the_towers_end_runs_in_five_layers_of_its_own() -> None:
    said = words("2xsample", "deepstack_vit", "lsvit_start_layer_6")
    config = read(**said)
    assert (config.vision["layers"], config.typed_vision().tap, post_encoder_layers(config)) == (11, 11, 5)
    assert [i.layer for i in plan(config).injections] == [6, 7, 8, 9]
    assert write_config(config) == config.published


def test_a_tower_that_really_is_five_layers_longer_has_none_appended() -> None:
    """The same plan in the same tower, but for where the last five layers come from."""
    longer = Replica(layers=8, tower_layers=11)
    said = words("2xsample", "deepstack_vit", "lsvit_start_layer_6")
    config, appended = read(longer, mm_vision_select_layer=-1, **said), read(**said)
    assert plan(config).digest == plan(appended).digest
    assert (post_encoder_layers(config), post_encoder_layers(appended)) == (0, 5)
    assert write_config(config) == config.published


# Hosts.
def inverse_frequencies(config: DeepStackConfig) -> torch.Tensor:
    with torch.device("cpu"):
        return AutoModelForCausalLM.from_config(text(config)).get_decoder().rotary_emb.inv_freq


PLAIN = 1 / 300 ** (torch.arange(0, 4, 2) / 4)


def test_the_rotary_base_survives() -> None:
    for host in ("llama", "phi3"):
        replica = Replica(layers=8, tower_layers=6, host=host)
        config = read(replica)
        torch.testing.assert_close(inverse_frequencies(config), PLAIN)
        reloaded = DeepStackConfig(**config.to_dict())
        torch.testing.assert_close(inverse_frequencies(reloaded), PLAIN)
        config.published = None
        assert write_config(config)["rope_theta"] == 300.0


def test_linear_scaling_of_llama_survives() -> None:
    for key in ("type", "rope_type"):
        config = read(rope_scaling={key: "linear", "factor": 2.0})
        torch.testing.assert_close(inverse_frequencies(config), PLAIN / 2)
    config.published = None
    assert write_config(config)["rope_scaling"] == {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize("name", ["su", "longrope"])
def test_long_scaling_of_phi3_survives(name: str, caplog: pytest.LogCaptureFixture) -> None:
    phi3 = Replica(layers=8, tower_layers=6, host="phi3")
    scaling = {"type": name, "short_factor": [1.5, 2.0], "long_factor": [3.0, 4.0]}
    said = {"rope_scaling": scaling, "max_position_embeddings": 512, "original_max_position_embeddings": 64}
    config = read(phi3, **said)
    torch.testing.assert_close(inverse_frequencies(config), PLAIN / torch.tensor([1.5, 2.0]))
    rotary = AutoModelForCausalLM.from_config(text(config)).get_decoder().rotary_emb
    # 4.39's: sqrt(1 + log(512 / 64) / log(64)), and the long factors beyond the original length.
    assert rotary.attention_scaling == pytest.approx(1.5**0.5)
    rotary(torch.zeros(1, 100, 16), torch.arange(100)[None])
    torch.testing.assert_close(rotary.inv_freq, PLAIN / torch.tensor([3.0, 4.0]))
    assert config.published["rope_scaling"] == scaling  # constructors of transformers write into what they are given
    config.published = None
    written = write_config(config)
    assert written["rope_scaling"] == {**scaling, "type": "su"}
    assert text(read_config(written, phi3.tower(), None)).to_dict() == text(config).to_dict()


def test_every_value_of_the_host_survives_and_no_setting_of_generate_enters() -> None:
    values = {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
        "attention_bias": True,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "tie_word_embeddings": True,
        "eos_token_id": 5,
        "use_cache": False,
        "initializer_range": 0.3,
    }
    junk = {"max_length": 20, "do_sample": True, "temperature": 0.7, "num_beams": 3, "bad_words_ids": None, "top_k": 9}
    config = read(**values, **junk)
    found = text(config).to_dict()
    assert {key: found[key] for key in values} == values
    assert not junk.keys() & found.keys()
    assert unread_keys({**L.config(), **junk}) == []
    assert config.tie_word_embeddings is True
    assert text(config).dtype is torch.bfloat16
    phi3 = Replica(layers=8, tower_layers=6, host="phi3")
    assert text(read(phi3, sliding_window=31)).sliding_window == 31


def test_keys_that_nobody_reads_are_named_and_come_back() -> None:
    published = {**L.config(), "mm_colour": "blue", "zoom": 3}
    assert unread_keys(published) == ["mm_colour", "zoom"]
    assert write_config(read_config(published, L.tower(), None)) == published


def test_only_what_changed_is_written_anew() -> None:
    config = read(mm_colour="blue")
    config.sample_max_length = 100
    text(config).rope_parameters["rope_theta"] = 500.0
    config.plan = Plan.build(ModelConfig(name="mine", start_layer=2), llm_layers=8, vit_layers=5).to_dict()
    config.dtype = torch.float32
    written = write_config(config)
    assert written["tokenizer_model_max_length"] == 100
    assert (written["rope_theta"], written["torch_dtype"]) == (500.0, "float32")
    assert written["deepstack_start_id"] == 2
    assert (written["mm_colour"], written["mm_vision_tower"]) == ("blue", TOWER_NAME)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 8}, "head_dim=8"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "no scaling but linear, dynamic"),
    ],
)
def test_a_host_that_the_published_code_has_no_key_for_is_refused(change: dict[str, Any], said: str) -> None:
    config = read()
    for key, value in change.items():
        setattr(text(config), key, value)
    with pytest.raises(ValueError, match=said):
        write_config(config)


def test_a_host_that_the_published_code_does_not_know_is_refused() -> None:
    config = read()
    config.text_config = DeepStackConfig(text_config={"model_type": "qwen3"}).text_config
    with pytest.raises(ValueError, match="is a qwen3, which the published code does not know"):
        write_config(config)


@pytest.mark.parametrize("values", [{"projector": "pixel_shuffle"}, {"projector_sharing": "per_injection"}])
def test_projectors_that_the_published_code_has_not_are_no_way_back(values) -> None:
    config = read()
    for key, value in values.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=r"projectors there are linear and mlp2x_gelu, one for all"):
        write_config(config)
