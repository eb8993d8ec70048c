"""Models of random weights for the benchmarks, and batches for them. No network, no tokenizer."""

import numpy as np
import torch
from PIL import Image

from deepstack_pl.batch import MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.language.config import Attention, LLMConfig
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import ModelConfig, Sequence
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import full_grid_size

BASELINE = ModelConfig(name="baseline", tiles=0, groups=0)
STACKED = ModelConfig(name="deepstack_l", start_layer=1)
LONG = ModelConfig(name="long_context", groups=0, sequence=Sequence.global_and_tiles)


def llm_of(
    width: int = 320, layers: int = 12, heads: int = 5, vocabulary: int = 8192, attention: Attention = Attention.sdpa
) -> LLMConfig:
    """A Llama; as it stands, of 20 million parameters."""
    return LLMConfig(
        name="bench",
        family="llama",
        attention=attention,
        architecture={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": int(2.7 * width) // 32 * 32,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    )


def vision_of(patches: int = 12, width: int = 128, layers: int = 4) -> VisionConfig:
    """A tower whose views are of ``patches`` by ``patches`` tokens."""
    return VisionConfig(name="bench", image_size=4 * patches, patch_size=4, width=width, layers=layers, heads=4)


def model_of(plan: ModelConfig, llm: LLMConfig, vision: VisionConfig) -> DeepStackForConditionalGeneration:
    """In training, all of it."""
    projector = ProjectorConfig(name="mlp")
    return build_model(plan, llm, vision, projector, seed=0, image_token_id=_image_token(llm)).train()


def _image_token(llm: LLMConfig) -> int:
    return int(llm.architecture["vocab_size"])  # beyond the embedding: it is never looked up


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A page with detail at every scale."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample_of(
    model: DeepStackForConditionalGeneration, seed: int, text: int, images: int = 1, question: float = 0.4
) -> Sample:
    """``text`` tokens after ``images`` images that fill the grid, the first share of them not learned."""
    vision, rng = model.config.typed_vision(), np.random.default_rng(seed)
    words = rng.integers(3, model.config.text_config.vocab_size, text).tolist()
    ids = [model.config.image_token_id] * images + words
    asked = images + int(question * text)
    size = full_grid_size(model.plan, vision)  # smaller ones would be cut into fewer tiles
    sample = make_sample(
        f"sample {seed}",
        ids,
        [-100] * asked + ids[asked:],
        [picture(seed + place, *size) for place in range(images)],
        plan=model.plan,
        vision=vision,
        image_token_id=model.config.image_token_id,
        max_length=2**31,
    )
    assert len(sample.views) == images * (1 + model.plan.tiles), "a grid that is not full"
    return sample


def batch_of(model: DeepStackForConditionalGeneration, rows: list[Sample] | list[list[Sample]]) -> MultimodalBatch:
    """Padded on the right."""
    per_view = model.config.typed_vision().patches_per_side ** 2
    return collate(rows, pad_id=0, side=PadSide.right, tokens_per_view=per_view)


def learn(model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> torch.Tensor:
    """Forward and backward of one micro-batch; the sum of its losses."""
    model.zero_grad()
    total = model(**batch.training_inputs(), use_cache=False).losses.sum()
    total.backward()
    return total.detach()
