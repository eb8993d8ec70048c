"""What is stacked, and where: the values of the ``model`` group. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum


class Host(Enum):
    """The network whose residual stream receives."""

    llm = "llm"  # DeepStack-L: before a decoder layer, at the image's positions
    vit = "vit"  # DeepStack-V: before a block of the vision tower, at the global view's patches


class Dealing(Enum):
    """How a mosaic of tiles is dealt into groups of one global view's size (method A.3)."""

    strided_2d = "strided_2d"  # group (i, j) takes every gh-th row and gw-th column: aligned with the global view
    strided_1d = "strided_1d"  # group k takes every G-th token of the raster order
    tiles = "tiles"  # group k is tile k itself


class GridRule(Enum):
    """Which grid of tiles an image becomes."""

    best_fit = "best_fit"  # LLaVA's rule over all grids of at most `tiles` cells, 1x1 excluded
    square = "square"  # always floor(sqrt(tiles)) a side


class Sequence(Enum):
    """What an image contributes to the text sequence."""

    global_view = "global_view"  # its global view's tokens
    global_and_tiles = "global_and_tiles"  # the global view, then every group: the long-context control


class Operator(Enum):
    """How a group enters the residual stream."""

    add = "add"
    gated_add = "gated_add"  # times tanh of a learned scalar that starts at zero


class Overflow(Enum):
    """What happens to an injection beyond the host's depth."""

    refuse = "refuse"
    drop = "drop"  # as the published code does; listed in the plan and in the receipt


class Collisions(Enum):
    """What happens where two injections meet on one layer."""

    refuse = "refuse"
    sum = "sum"


@dataclass(kw_only=True, slots=True)
class InjectionConfig:
    """One injection: ``group`` enters ``host`` before ``layer``."""

    group: int
    layer: int
    host: Host = Host.llm
    operator: Operator = Operator.add


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A plan as a person writes it; `stacking.plan.Plan` is the same, resolved and validated.

    The schedule ``group k -> layer start_layer + k * interval`` of ``host`` comes first; ``injections`` lists
    whatever a schedule cannot say. ``groups: 0`` is no schedule at all.
    """

    name: str = "???"
    tiles: int = 4  # largest number of tiles an image becomes; 0: the global view alone
    grid: GridRule = GridRule.best_fit
    dealing: Dealing = Dealing.strided_2d
    sequence: Sequence = Sequence.global_view
    host: Host = Host.llm
    start_layer: int = 1
    interval: int = 1
    groups: int = 4
    operator: Operator = Operator.add
    overflow: Overflow = Overflow.refuse
    collisions: Collisions = Collisions.refuse
    injections: list[InjectionConfig] = field(default_factory=list)
