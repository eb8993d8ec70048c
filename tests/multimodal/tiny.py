"""Tiny models and samples, as functions: random weights, no tokenizer, no files."""

import numpy as np
from PIL import Image

from deepstack_pl.batch import MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.language.config import LLMConfig
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Host, InjectionConfig, ModelConfig, Sequence
from deepstack_pl.vision.config import VisionConfig

IMAGE_TOKEN = 63

PLANS = {
    "baseline": ModelConfig(name="baseline", tiles=0, groups=0),
    "deepstack_l": ModelConfig(name="deepstack_l", start_layer=1),
    "deepstack_v": ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0),
    "deepstack_lv": ModelConfig(
        name="deepstack_lv",
        start_layer=0,
        injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)],
    ),
    "long_context": ModelConfig(name="long_context", groups=0, sequence=Sequence.global_and_tiles),
}


def tiny_vision() -> VisionConfig:
    return VisionConfig(name="tiny", image_size=16, patch_size=4, width=16, layers=4, heads=2)


def tiny_llm(tied: bool = False, layers: int = 6) -> LLMConfig:
    return LLMConfig(
        name="tiny",
        family="llama",
        architecture={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )


def tiny_model(plan: ModelConfig, *, tied: bool = False, seed: int = 0) -> DeepStackForConditionalGeneration:
    return build_model(
        plan, tiny_llm(tied), tiny_vision(), ProjectorConfig(name="mlp"), seed=seed, image_token_id=IMAGE_TOKEN
    ).eval()


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


MIXED = [  # ids, images: text alone, a full grid, two images of different grids, a wide one
    ([1, 5, 6, 7, 8, 9, 2], []),
    ([1, IMAGE_TOKEN, 11, 12, 13, 2], [picture(0, 64, 64)]),
    ([1, 20, IMAGE_TOKEN, 21, 22, IMAGE_TOKEN, 23, 24, 2], [picture(1, 90, 30), picture(2, 40, 50)]),
    ([1, 30, 31, IMAGE_TOKEN, 32, 2], [picture(3, 120, 30)]),
]


def samples(model: DeepStackForConditionalGeneration, rows: list | None = None) -> list[Sample]:
    return [
        make_sample(
            f"row {i}",
            ids,
            ids,
            images,
            plan=model.plan,
            vision=model.config.typed_vision(),
            image_token_id=IMAGE_TOKEN,
            max_length=512,
        )
        for i, (ids, images) in enumerate(MIXED if rows is None else rows)
    ]


def batch_of(
    model: DeepStackForConditionalGeneration, rows: list | None = None, side: PadSide = PadSide.right
) -> MultimodalBatch:
    per_view = model.config.typed_vision().patches_per_side ** 2
    return collate(samples(model, rows), pad_id=0, side=side, tokens_per_view=per_view)


def prompts(batch: MultimodalBatch) -> dict:
    return {k: v for k, v in batch.model_inputs().items() if k not in ("labels", "position_ids")}
