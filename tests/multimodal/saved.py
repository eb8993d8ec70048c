"""A folder as a run leaves it, and what is asked of it in Hugging Face's words: tiny, random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tiny import PLANS, picture, tiny_llm, tiny_vision

from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig

SMALL, WIDE = picture(0, 64, 64), picture(1, 90, 30)


def save(folder: Path, plan: ModelConfig = PLANS["deepstack_l"], template: str = "shipped") -> Path:
    tokenizer, llm = load_tokenizer(None), tiny_llm()
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    llm = replace(llm, architecture=llm.architecture | {"vocab_size": 512})
    model = build_model(plan, llm, tiny_vision(), ProjectorConfig(name="mlp"), seed=0, image_token_id=image)
    model.config.template, model.config.sample_max_length = template, 512
    model.save_pretrained(folder)
    DeepStackProcessor(
        tokenizer, plan=model.plan, vision=tiny_vision(), template=template, max_length=512
    ).save_pretrained(folder)
    return folder


def asks(text: str, *images: Image.Image | str | Path) -> list[dict[str, Any]]:
    """One message: each image, then the text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CHATS = [  # an image, none, two, and one in a second question
    asks("Name the colours.", SMALL),
    asks("Say something."),
    asks("Which is wider?", SMALL, WIDE),
    [*asks("Hello."), {"role": "assistant", "content": "red"}, *asks("And now?", WIDE)],
]
