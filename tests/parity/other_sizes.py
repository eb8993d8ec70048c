"""Published models of other sizes than the golden ones: nothing in common but the layout."""

from published_model import IMAGE, Published, Row

_HOST = {
    "vocab_size": 70,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}
_TOWER = {
    "image_size": 30,
    "patch_size": 6,
    "hidden_size": 24,
    "intermediate_size": 50,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_PLAN = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_hidden_size": 24,
    "num_crops": 6,
    "deepstack_start_id": 0,
    "deepstack_interval": 1,
    "deepstack_args_for_ablation": "",
}
_STEM = "model.vision_tower.vision_tower.vision_model."


def plain() -> Published:
    """Tied embeddings, grouped queries, an exact GELU in the tower, a linear projector; one row is cut in its image."""
    return Published(
        name="plain",
        tower=_TOWER,
        tower_name="small_tower",
        host={**_HOST, "tie_word_embeddings": True},
        plan=_PLAN,
        rows=[
            Row(ids=[1, 5, IMAGE, 9, 10, 11, 2], answer=3, grid=(3, 2)),
            Row(ids=[1, 20, 21, 22, 23], answer=2),
            Row(ids=[1, 30, 31, 32, 33, 34, 35, 36, 37, IMAGE, 38], answer=0, grid=(1, 4)),
        ],
        max_length=31,
        kept_layers=(0, 4, 6),
        gradients=(
            "model.mm_projector.weight",
            "model.embed_tokens.weight",
            "model.layers.5.mlp.down_proj.weight",
            f"{_STEM}encoder.layers.1.self_attn.k_proj.bias",
            f"{_STEM}encoder.layers.1.mlp.fc1.weight",
            f"{_STEM}embeddings.patch_embedding.weight",
        ),
        greedy=5,
    )


def hd() -> Published:
    """DeepStack-L-HD with nine groups, from the embeddings on, beyond the depth; another state of the tower."""
    return Published(
        name="hd",
        tower_name="coarse_tower",
        tower={**_TOWER, "image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu"},
        host=_HOST,
        plan={
            **_PLAN,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -1,
            "num_crops": 9,
            "deepstack_start_id": 1,
            "is_anyres_deepstack": True,
        },
        rows=[
            Row(ids=[1, 5, IMAGE, 9, 10, 2], answer=3, grid=(2, 3)),
            Row(ids=[1, IMAGE, 9, 10, 11, 2], answer=2, grid=(4, 1)),
        ],
        gradients=("model.image_newline", "model.mm_projector.2.weight", "model.layers.0.self_attn.v_proj.weight"),
        greedy=4,
    )


def text() -> Published:
    """Not one image; one row."""
    return Published(
        name="text",
        tower=_TOWER,
        host=_HOST,
        plan={**_PLAN, "deepstack_sampling": "1d"},
        rows=[Row(ids=[1, 20, 21, 22, 23], answer=2)],
        kept_layers=(0,),
    )


def dealt_1d() -> Published:
    """The other dealing, on one row that is larger than the others of its kind."""
    return Published(
        name="dealt_1d",
        tower=_TOWER,
        host=_HOST,
        plan={**_PLAN, "deepstack_sampling": "1d", "deepstack_interval": 2},
        rows=[Row(ids=[1, IMAGE, 21, 22, 23], answer=2, grid=(5, 1))],
        kept_layers=(6,),
    )


def stacked_in_the_tower(name: str, *, start: int, crops: int = 4, select_layer: int = -2) -> Published:
    """DeepStack-V; at the tower's own depth the published code appends five layers to it."""
    side = int(crops**0.5)
    return Published(
        name=name,
        tower=_TOWER,
        host=_HOST,
        plan={
            **_PLAN,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": select_layer,
            "num_crops": crops,
            "deepstack_args_for_ablation": f"2xsample+deepstack_vit+lsvit_start_layer_{start}",
        },
        rows=[
            Row(ids=[1, 5, IMAGE, 9, 10, 2], answer=3, grid=(side, side)),
            Row(ids=[1, IMAGE, 9, 2], answer=2, grid=(side, side)),
        ],
        gradients=("model.mm_projector.0.weight",),
    )


OTHER_SIZES = {make.__name__: make for make in (plain, hd, text, dealt_1d)} | {
    "all_four_in_the_tower": lambda: stacked_in_the_tower("all_four_in_the_tower", start=0),
    "seven_of_nine_beyond": lambda: stacked_in_the_tower("seven_of_nine_beyond", start=3, crops=9),
    "in_appended_layers": lambda: stacked_in_the_tower("in_appended_layers", start=5),
}
# Groups whose layer would be the one after the last: the state that is read there is nobody's input.
AFTER_THE_LAST = {
    "after_the_last": lambda: stacked_in_the_tower("after_the_last", start=3, select_layer=-1),
    "after_the_appended": lambda: stacked_in_the_tower("after_the_appended", start=5, crops=9),
}
