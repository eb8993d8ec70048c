"""Qwen3-VL's plan is Qwen3-VL: transformers' own model is the oracle, tiny and random."""

import torch
from tiny import tiny_vision
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from deepstack_pl.language.host import CARRIER, Carrier, decoder_layers, install
from deepstack_pl.stacking.config import ModelConfig, Source
from deepstack_pl.stacking.plan import Plan

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
QWEN3_STYLE = ModelConfig(name="qwen3_style", tiles=0, source=Source.tap, taps=[1, 2, 3], groups=3)


def entering(layers) -> list[torch.Tensor]:
    """What each layer is given, in a list that fills as the model runs. Hooks of the host come first."""
    given: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    return given


def test_layer_inputs_under_the_qwen3_plan_equal_those_of_transformers_own_text_model() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e6}
    theirs = Qwen3VLTextModel(
        Qwen3VLTextConfig(**TEXT, rope_parameters={**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True})
    ).eval()
    ours = Qwen3ForCausalLM(Qwen3Config(**TEXT, rope_parameters=rope)).eval()
    ours.model.load_state_dict(theirs.state_dict())
    plan = Plan.build(QWEN3_STYLE, llm_layers=5, vit_layers=tiny_vision().tap)
    install(ours, plan)
    embeds, taps = torch.randn(2, 12, 32), torch.randn(3, 7, 32)
    index = torch.full((2, 12), -1)
    index[0, 2:6], index[1, 5:8] = torch.arange(4), torch.arange(4, 7)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    expected, found = entering(theirs.layers), entering(decoder_layers(ours))
    with torch.no_grad():
        theirs(
            inputs_embeds=embeds, attention_mask=mask, visual_pos_masks=index >= 0, deepstack_visual_embeds=list(taps)
        )
        carrier = Carrier(features=taps, index=index, scales=None, traces=None)
        ours(inputs_embeds=embeds, attention_mask=mask, **{CARRIER: carrier})
    assert len(found) == len(expected) == 5
    for layer, (own, there) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(own, there, msg=lambda text, layer=layer: f"layer {layer}: {text}")
    assert not torch.equal(found[1], found[0])
