"""Stages and optimisers as values. Loads without torch."""

from dataclasses import dataclass, field

from deepstack_pl.multimodal.config import LoRAConfig


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """One part of the model during a stage."""

    trained: bool = True
    lr: float = 1e-3  # peak learning rate; ignored (and said so) where the part is frozen
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # of rank 1 or more: adapters learn, the part's weights do not


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Which parts learn, and how fast: scratch, pretrain (projector only), finetune."""

    name: str = "???"
    vision: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    llm: PartConfig = field(default_factory=PartConfig)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with a linear warm-up and cosine decay (LLaVA-1.5's recipe)."""

    name: str = "???"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0
