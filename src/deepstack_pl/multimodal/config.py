"""The bridge from vision width to language width, and the plan that joins both hosts. Loads without torch."""

from dataclasses import dataclass
from enum import Enum

from deepstack_pl.language.config import LLMConfig
from deepstack_pl.stacking.config import ModelConfig, Sequence
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig


class ProjectorKind(Enum):
    """Shape of a projector."""

    linear = "linear"
    mlp2x_gelu = "mlp2x_gelu"  # Linear, exact GELU, Linear: LLaVA-1.5's


class Sharing(Enum):
    """How many projectors there are."""

    shared = "shared"  # one for the global view and every group (paper, section 3)
    global_and_tiles = "global_and_tiles"  # one for global views, another for every other view


@dataclass(kw_only=True, slots=True)
class ProjectorConfig:
    name: str = "???"
    kind: ProjectorKind = ProjectorKind.mlp2x_gelu
    sharing: Sharing = Sharing.shared


def build_plan(model: ModelConfig, llm: LLMConfig, vision: VisionConfig) -> Plan:
    """The plan, checked against the depths that conf writes down: before any weight exists."""
    return check_pooling(Plan.build(model, llm_layers=llm.layers, vit_layers=vision.tap), vision)


def check_pooling(plan: Plan, vision: VisionConfig) -> Plan:
    """``plan``, if it pools a view of ``vision``'s patches without remainder.

    Raises:
        ValueError: it does not.
    """
    if vision.patches_per_side % plan.pooling:
        raise ValueError(
            f"model.pooling={plan.pooling} does not divide a view's {vision.patches_per_side} patches a side "
            f"(vision={vision.name}): squares must cover the view exactly."
        )
    return plan


def check_projector(plan: Plan, sharing: Sharing) -> None:
    """Refuse two projectors where one would do nothing, or where features are projected as one.

    Raises:
        ValueError: naming the plan's sequence and the remedy.
    """
    if sharing is Sharing.global_and_tiles and not (plan.tiles_reach_feature and plan.reads_global_view):
        idle = "global views" if plan.tiles_reach_feature else "tiles"
        raise ValueError(
            f"projector.sharing={sharing.name}: under plan {plan.name} no {idle} reach the LLM, and their projector "
            "would learn nothing. Say projector.sharing=shared (projector=mlp)."
        )
    if plan.sequence is Sequence.channels and sharing is not Sharing.shared:
        raise ValueError(
            f"projector.sharing={sharing.name} with model.sequence=channels: a position's tokens are projected as "
            "one. Say projector.sharing=shared."
        )
