"""The bridge from vision width to language width, and the plan that joins both hosts. Loads without torch."""

from dataclasses import dataclass
from enum import Enum

from deepstack_pl.language.config import LLMConfig
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig


class ProjectorKind(Enum):
    """Shape of the projector; one, shared by the global view and every group (paper, section 3)."""

    linear = "linear"
    mlp2x_gelu = "mlp2x_gelu"  # Linear, exact GELU, Linear: LLaVA-1.5's


@dataclass(kw_only=True, slots=True)
class ProjectorConfig:
    name: str = "???"
    kind: ProjectorKind = ProjectorKind.mlp2x_gelu


def build_plan(model: ModelConfig, llm: LLMConfig, vision: VisionConfig) -> Plan:
    """The plan, checked against the depths that conf writes down: before any weight exists."""
    return Plan.build(model, llm_layers=llm.layers, vit_layers=vision.tap)
