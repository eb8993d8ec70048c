"""Towers of every library: the library's own hidden states, injections in between, gradients, positions."""

from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from tiny_towers import ALL, CONFIGS, drawn, filled, library_states, pictures, states
from torch import Tensor

from deepstack_pl.stacking.config import Host, ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig, VisionLibrary, check_one_pass
from deepstack_pl.vision.encoder import VisionEncoder
from deepstack_pl.vision.towers import build_tower
from deepstack_pl.vision.towers_face import Tower

ONE_PASS = [name for name in ALL if name not in ("qwen3_vl", "siglip", "timm_siglip")]


def host(tower: Tower, groups: int) -> VisionEncoder:
    """An encoder around this very tower, with ``groups`` groups of four tiles before its first blocks."""
    config = ModelConfig(name="p", host=Host.vit, start_layer=0, groups=groups)
    encoder = VisionEncoder(tower.config, Plan.build(config, llm_layers=4, vit_layers=tower.config.tap))
    encoder.tower = tower
    return encoder


@pytest.mark.parametrize("name", ALL)
def test_every_hidden_state_is_the_librarys_own(name: str) -> None:
    tower, model = filled(name)
    views = pictures(tower)
    for mine, theirs in zip(states(tower, views), library_states(model, views), strict=True):
        if name == "qwen3_vl":  # its convolution is a matrix here, and positions are interpolated by torch
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)
        else:
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ALL)
def test_a_stack_that_adds_nothing_leaves_the_librarys_own_feature(name: str) -> None:
    tower, model = filled(name)
    views, patches = pictures(tower, 5), tower.config.patches_per_side**2
    found = host(tower, 3)(views, torch.full((3, patches), -1))[0]
    expected = library_states(model, views[:1])[tower.config.tap][:, tower.prefix :]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_group_lands_on_patches_of_the_global_view_and_nowhere_else(name: str) -> None:
    tower = drawn(name)
    views, patches = pictures(tower, 5), tower.config.patches_per_side**2
    rows = torch.randint(patches, 5 * patches, (3, patches), generator=torch.Generator().manual_seed(2))
    rows[1, ::2] = -1
    every = tower.embed(views)[:, tower.prefix :].flatten(0, 1)
    hidden = tower.embed(views[:1])
    for layer in range(3):
        for place, row in enumerate(rows[layer].tolist()):
            if row >= 0:
                hidden[0, tower.prefix + place] += every[row]
        if layer < tower.config.tap:
            hidden = tower.run(layer, hidden)
    torch.testing.assert_close(host(tower, 3)(views, rows)[0], hidden[:, tower.prefix :], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("tap", [0, 1, 3])
@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_parameter_but_the_unreachable(name: str, tap: int) -> None:
    tower = drawn(name, feature_layer=tap)
    hidden = tower.embed(pictures(tower))
    for layer in range(tap):
        hidden = tower.run(layer, hidden)
    (hidden[:, tower.prefix :] ** 2).sum().backward()
    unreached = [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == tower.unreachable()


@pytest.mark.parametrize("name", ALL)
def test_views_do_not_see_each_other(name: str) -> None:
    tower = drawn(name)
    views = pictures(tower)
    alone = torch.cat([states(tower, view[None])[-1] for view in views])
    torch.testing.assert_close(states(tower, views)[-1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_tower_in_bfloat16_takes_views_in_its_dtype(name: str) -> None:
    tower = drawn(name).to(torch.bfloat16)
    assert tower.dtype is torch.bfloat16
    assert {state.dtype for state in states(tower, pictures(tower).to(tower.dtype))} == {torch.bfloat16}


@pytest.mark.parametrize("name", ALL)
def test_a_tower_without_memory_has_the_same_parameters_and_no_buffers_to_lose(name: str) -> None:
    with torch.device("meta"):
        tower = build_tower(CONFIGS[name])
    assert all(p.is_meta for p in tower.parameters())
    assert list(tower.buffers()) == []
    shapes = {key: value.shape for key, value in build_tower(CONFIGS[name]).state_dict().items()}
    assert {key: value.shape for key, value in tower.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_tile_in_one_pass_is_a_view(name: str) -> None:
    tower = drawn(name)
    views = pictures(tower)
    torch.testing.assert_close(tower.embed_together(views, (1, 1)), tower.embed(views), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_tiles_in_one_pass_are_the_enlarged_image_as_transformers_embeds_it(name: str) -> None:
    tower, model = filled(name)
    tiles = pictures(tower, 4)
    whole = rearrange(tiles, "(r c) d h w -> 1 d (r h) (c w)", r=2)
    asked = {"interpolate_pos_encoding": True} if name == "clip" else {}
    expected = tower.norm(model.get_submodule("embeddings")(whole, **asked))  # type: ignore[operator]
    torch.testing.assert_close(tower.embed_together(tiles, (2, 2)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "siglip", "timm_siglip"])
def test_towers_that_cannot_read_tiles_in_one_pass_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.encoding=one_pass with vision=tiny.*Say model\.encoding=separate"):
        check_one_pass(CONFIGS[name])
    for other in ONE_PASS:
        check_one_pass(CONFIGS[other])


def test_pixels_that_no_patch_sees_change_nothing() -> None:
    for name in ("siglip", "timm_siglip"):
        tower = drawn(name)  # 18 pixels: four patches of four a side
        views = pictures(tower)
        changed = views.clone()
        changed[..., 16:, :] = changed[..., :, 16:] = 7.0
        assert tower.config.patches_per_side == 4
        assert torch.equal(tower.embed(views), tower.embed(changed))


def test_tokens_stand_in_raster_order() -> None:
    for name in ALL:
        tower = drawn(name)
        views = pictures(tower, 1).expand(2, -1, -1, -1).clone()
        views[1, :, 4:8, 8:12] += 1.0  # second row, third column
        before, after = tower.embed(views)[:, tower.prefix :]
        assert (before != after).any(-1).nonzero().flatten().tolist() == [4 + 2], name


TIMM = {"library": VisionLibrary.timm, "quick_gelu": False, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "vit_base_patch99"}, r"has no such model"),
        ({"family": "resnet18"}, r"cannot be built with conf's values"),
        ({"family": "deit_base_distilled_patch16_224"}, r"is a VisionTransformerDistilled .* cannot be run one by one"),
        ({"family": "vit_relpos_base_patch16_224"}, r"is a VisionTransformerRelPos .* cannot be run one by one"),
        ({"family": "eva02_tiny_patch14_224"}, r"is a Eva of timm\.models\.eva"),
        ({"architecture": {"depth": 2}}, r"architecture\.depth has a field of vision's own"),
        ({"architecture": {"reg_tokenz": 2}}, r"cannot be built with conf's values .*reg_tokenz"),
        ({"architecture": {"patch_drop_rate": 0.1}}, r"dropout of patches"),
        ({"architecture": {"pos_embed": "none"}}, r"no learned positions"),
        ({"quick_gelu": True}, r"disagree .*'activation': \('quick_gelu', 'gelu'\)"),
        ({"layer_norm_eps": 1e-5}, r"disagree .*layer_norm_eps"),
    ],
)
def test_a_timm_model_that_is_no_plain_vision_transformer_is_refused(changes: dict[str, Any], sentence: str) -> None:
    values = {"family": "vit_base_patch16_224", "image_size": 16, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
    with pytest.raises(ValueError, match=sentence):
        build_tower(VisionConfig(**TIMM | values | changes))
    assert timm.is_model(values["family"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"library": VisionLibrary.huggingface, "family": "siglip2_vision_model"}, "known are clip_vision_model"),
        ({"library": VisionLibrary.huggingface}, r"vision\.family=None"),
        ({"library": VisionLibrary.timm}, r"needs vision\.family"),
        ({"checkpoint": "a/b"}, r"vision\.checkpoint=a/b: a tower of vision\.library=open_clip does not read it"),
        ({"architecture": {"a": 1}}, r"vision\.architecture="),
        ({"gelu_tanh": True}, r"Say vision\.quick_gelu=false"),
        ({"library": VisionLibrary.timm, "family": "v", "open_clip_model": "x"}, r"vision\.open_clip_model=x"),
        ({"library": VisionLibrary.huggingface, "family": "qwen3_vl_vision", "image_size": 340}, "not a multiple"),
    ],
)
def test_values_that_no_tower_reads_are_refused_without_torch(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VisionConfig(**values)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("clip", {"architecture": {"hidden_size": 8}}, "has a field of vision's own"),
        ("clip", {"architecture": {"hiden_act": "gelu"}}, "is no value of clip_vision_model"),
        ("dinov2", {"architecture": {"hidden_dropout_prob": 0.1}}, "is no value of dinov2"),
        ("dinov2", {"mlp_ratio": 2.5}, "takes whole numbers"),
        ("qwen3_vl", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ],
)
def test_values_that_a_transformers_tower_has_not_are_refused(
    name: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        drawn(name, **changes)


def test_the_rotation_of_a_patch_goes_by_its_place() -> None:
    tower = drawn("qwen3_vl")
    views = pictures(tower, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    hidden: Tensor = tower.embed(views)
    moved = tower.run(0, hidden[:, order])
    assert not torch.allclose(moved, tower.run(0, hidden)[:, order], atol=1e-3)
