"""The bridge from vision width to language width, and the plan that joins both hosts. Loads without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from deepstack_pl.language.config import LLMConfig
from deepstack_pl.stacking.config import Encoding, Host, ModelConfig, Sequence, Source
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig, check_one_pass


class ProjectorKind(Enum):
    """Shape of a projector."""

    linear = "linear"
    mlp2x_gelu = "mlp2x_gelu"  # Linear, exact GELU, Linear: LLaVA-1.5's
    pixel_shuffle = "pixel_shuffle"  # the same, over squares of model.pooling tokens joined in the channels
    patch_merger = "patch_merger"  # Qwen3-VL's: a layer norm, such squares, two layers


JOINING = (ProjectorKind.pixel_shuffle, ProjectorKind.patch_merger)  # squares are joined, not averaged


class Sharing(Enum):
    """How many projectors there are."""

    shared = "shared"  # one for the global view and every group (paper, section 3); a tap has its own, always
    global_and_tiles = "global_and_tiles"  # one for global views, another for every other view
    per_injection = "per_injection"  # one for the text sequence, and one for every group that enters the LLM


@dataclass(kw_only=True, slots=True)
class ProjectorConfig:
    name: str = "???"
    kind: ProjectorKind = ProjectorKind.mlp2x_gelu
    sharing: Sharing = Sharing.shared


@dataclass(kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adapters beside a part's linear layers (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = 0  # 0: none, and the part is trained whole
    alpha: float = 256.0  # what adapters add is scaled by alpha / rank
    dropout: float = 0.05  # of what enters an adapter, in training
    # Which layers: the last words of their names (q_proj, mlp.down_proj). None named: every linear layer of the blocks.
    targets: list[str] = field(default_factory=list)


ADAPTED = ("vision", "llm")  # the parts that adapters can stand in; a projector is small, and trained whole


def check_lora(lora: Mapping[str, LoRAConfig]) -> None:
    """Refuse adapters that cannot be, by the part's name.

    Raises:
        ValueError: naming the value, the rule and the remedy.
    """
    for part, values in lora.items():
        if part not in ADAPTED:
            raise ValueError(
                f"stage.{part}.lora.rank={values.rank}: adapters stand in {' or '.join(ADAPTED)}; the {part} is small, "
                f"and trained whole. Say stage.{part}.lora.rank=0."
            )
        if values.rank < 1:
            raise ValueError(f"stage.{part}.lora.rank={values.rank}: a rank is 1 or more, and 0 says no adapters.")
        if values.alpha <= 0:
            raise ValueError(
                f"stage.{part}.lora.alpha={values.alpha}: what adapters add is scaled by alpha / rank. Give a number "
                "above zero; twice the rank is usual."
            )
        if not 0 <= values.dropout < 1:
            raise ValueError(
                f"stage.{part}.lora.dropout={values.dropout} is the share that is left out: use 0 up to, not with, 1."
            )


def build_plan(model: ModelConfig, llm: LLMConfig, vision: VisionConfig) -> Plan:
    """The plan, checked against the depths that conf writes down: before any weight exists."""
    if model.encoding is Encoding.one_pass:
        check_one_pass(vision)
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


def check_projector(plan: Plan, kind: ProjectorKind, sharing: Sharing) -> None:
    """Refuse projectors that would do nothing, and features that none of them fits.

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
    if sharing is Sharing.per_injection and not plan.at(Host.llm):
        raise ValueError(
            f"projector.sharing=per_injection, but plan {plan.name} injects nothing into the LLM. Say "
            "projector.sharing=shared (projector=mlp)."
        )
    spatial = [str(i) for i in plan.injections if i.source is Source.spatial]
    if kind in JOINING and sharing is not Sharing.per_injection and spatial:
        raise ValueError(
            f"{spatial[0]} with projector.kind={kind.name}: its tokens are single, but the shared projector takes "
            f"{plan.pooling}x{plan.pooling} of them. Say projector.sharing=per_injection or projector.kind=mlp2x_gelu."
        )
    if kind is ProjectorKind.pixel_shuffle and plan.pooling == 1:
        raise ValueError(
            "projector.kind=pixel_shuffle joins squares of model.pooling tokens, and model.pooling=1 leaves them "
            "single. Say model.pooling=2 or projector.kind=mlp2x_gelu."
        )
    if kind in JOINING and plan.sequence is Sequence.channels:
        raise ValueError(
            f"projector.kind={kind.name} with model.sequence=channels: groups stand in the channels there already. Say "
            "projector.kind=mlp2x_gelu."
        )
