"""A run small enough for tests of training, evaluation and inspection: two-colour pages, tiny networks, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from PIL import Image

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.data.columns import Columns
from deepstack_pl.language.config import LLMConfig
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import LoRAConfig, ProjectorConfig, build_plan
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.training.checkpoints import all_of
from deepstack_pl.training.config import OptimConfig, PartConfig, StageConfig, StrategyConfig
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.parts import adapters_of
from deepstack_pl.training.restore import read_plain
from deepstack_pl.training.strategies import make_strategy
from deepstack_pl.vision.config import VisionConfig

TOKENIZER = load_tokenizer(None)
COLOURS = {"red": (200, 30, 30), "teal": (20, 130, 130), "gold": (220, 180, 20), "navy": (10, 20, 110)}
VISION = VisionConfig(name="tiny", image_size=16, patch_size=4, width=16, layers=4, heads=2, mlp_ratio=2.0)
LLM = LLMConfig(
    name="tiny",
    family="llama",
    max_length=256,
    architecture={
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
)
TALKATIVE = replace(LLM, architecture={**LLM.architecture, "initializer_range": 0.3})  # answers hang on the picture
STACKED = ModelConfig(name="deepstack_l", start_layer=1)
SCRATCH = StageConfig(name="scratch")
FROZEN = PartConfig(trained=False)
PRETRAIN = StageConfig(name="pretrain", vision=FROZEN, llm=FROZEN)


def small_model(
    plan: ModelConfig = STACKED,
    llm: LLMConfig = LLM,
    device: str = "cpu",
    lora: Mapping[str, LoRAConfig] | None = None,
    tied: bool = False,
) -> DeepStackForConditionalGeneration:
    if tied:
        llm = replace(llm, architecture={**llm.architecture, "tie_word_embeddings": True})
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    projector = ProjectorConfig(name="mlp")
    return build_model(plan, llm, VISION, projector, seed=0, image_token_id=image, device=device, lora=lora)


def small_processor(plan: ModelConfig = STACKED) -> DeepStackProcessor:
    built = build_plan(plan, LLM, VISION)
    return DeepStackProcessor(TOKENIZER, plan=built, vision=VISION, template="shipped", max_length=LLM.max_length)


def small_module(
    plan: ModelConfig = STACKED, stage: StageConfig = SCRATCH, steps: int = 4, **optim: Any
) -> DeepStackModule:
    return DeepStackModule(
        partial(small_model, plan, lora=adapters_of(stage)), stage, OptimConfig(name="adamw", **optim), steps
    )


@dataclass
class Pages:
    """A source of pages in two colours, left and right; every third asks about the left one alone."""

    count: int = 12
    fingerprint: str = "two colours"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        names = list(COLOURS)
        left, right = names[index % 4], names[(index // 4 + index) % 4]
        page = Image.new("RGB", (32, 32), COLOURS[left])
        page.paste(COLOURS[right], (16, 0, 32, 32))
        short = index % 3 == 2
        facts = (left,) if short else (left, right)
        return Record(
            key=f"page {index}",
            turns=(Turn(Role.user, "<image>Which colours?"), Turn(Role.assistant, " ".join(facts))),
            images=(page,),
            kind="short" if short else "long",
            facts=facts,
        )

    def key(self, index: int) -> str:
        return f"page {index}"

    def parts(self) -> dict[str, str]:
        return {"pages": self.fingerprint}

    @property
    def columns(self) -> Columns:
        return Columns.plain(self.count)

    def describe(self) -> str:
        return f"{self.count} pages in two colours"


def newest(folder: Path) -> Path:
    """The newest checkpoint in ``folder``."""
    return all_of(folder)[0].folder


def saved(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint in ``folder`` holds besides weights and states."""
    return read_plain(all_of(folder)[0])


def small_trainer(folder: Path, steps: int = 4, **more: Any) -> lightning.Trainer:
    more.setdefault("strategy", make_strategy(StrategyConfig(name="single"), torch.device("cpu"), 1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "gradient_clip_val": 1.0}
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        enable_model_summary=False,
        default_root_dir=str(folder),
        log_every_n_steps=1,
        **{**quiet, **more},
    )
