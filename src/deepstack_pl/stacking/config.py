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
    scattered = "scattered"  # every token somewhere, the same for all images: a control that has all but the places


class Source(Enum):
    """What an injection adds."""

    tiles = "tiles"  # a group dealt from the mosaic of tiles, one token under every token of the global view
    global_view = "global_view"  # the global view's own tokens once more: the control of the paper's table 6
    detail = "detail"  # a group dealt from every view's own enlargement: DeepStack-L-HD (method A.7)
    tap = (
        "tap"  # the text sequence's own tokens, as `taps` reads them elsewhere in the tower: Qwen3-VL, Granite 4 Vision
    )
    spatial = "spatial"  # one token of each square that `pooling` joins, by its place in it: Granite 4 Vision


class GridRule(Enum):
    """Which grid of tiles an image becomes."""

    best_fit = "best_fit"  # LLaVA's rule over all grids of at most `tiles` cells, 1x1 excluded
    square = "square"  # always floor(sqrt(tiles)) a side


class Resize(Enum):
    """How an image is enlarged to its grid; the global view is always a plain stretch."""

    stretch = "stretch"  # to the whole grid: global view and mosaic share one coordinate system
    letterbox = "letterbox"  # keeping its shape, centred on black: the paper's "inconsistent" (table 5)


class Encoding(Enum):
    """How the tower reads the tiles of one image."""

    separate = "separate"  # each tile by itself
    one_pass = "one_pass"  # as one enlarged image, positions interpolated


class Sequence(Enum):
    """What an image contributes to the text sequence."""

    global_view = "global_view"  # its global view's tokens
    global_and_tiles = "global_and_tiles"  # the global view, then every tile's tokens: the long-context control
    tiles = "tiles"  # the tiles' tokens alone
    blank = "blank"  # as many positions as a global view has, their embeddings zero: all that is seen is injected
    channels = "channels"  # one position a patch: the global token and its groups side by side, projected as one


class Order(Enum):
    """How the tiles' tokens follow each other in the text sequence."""

    by_group = "by_group"  # group after group, as they are dealt
    raster = "raster"  # the mosaic's rows, top to bottom


class Unfilled(Enum):
    """What a group that a small grid does not fill takes in the text sequence."""

    leave_out = "leave_out"
    zeros = "zeros"  # zero tokens, so that every image is equally long, as published


class Newline(Enum):
    """Whether a learned vector ends every row of the mosaic in the text sequence."""

    none = "none"
    rows = "rows"
    rows_and_groups = "rows_and_groups"  # and is added there again with every group of detail, as published


class Operator(Enum):
    """How a group enters the residual stream."""

    add = "add"
    gated_add = "gated_add"  # times tanh of a learned scalar that starts at zero
    noise = "noise"  # in its place one fixed direction, as strong as each token: a control that has all but the content


OPERATORS = {Operator.add: "", Operator.gated_add: ", gated", Operator.noise: ", noise"}  # behind an injection's name


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
    """One injection: ``group`` of ``source`` enters ``host`` before ``layer``."""

    layer: int
    group: int = 0
    source: Source = Source.tiles
    host: Host = Host.llm
    operator: Operator = Operator.add


Dealt = tuple[Source, int]  # a group: where it is dealt from, and which of these


@dataclass(frozen=True, slots=True)
class Injection:
    """``group`` of ``source`` is added to ``host``'s residual stream before ``layer``."""

    host: Host
    layer: int
    group: int
    operator: Operator = Operator.add
    source: Source = Source.tiles

    @property
    def dealt(self) -> Dealt:
        """The group it adds; injections of one group share a row of the index table."""
        return self.source, self.group

    @property
    def what(self) -> str:
        """The group, for people."""
        if self.source is Source.global_view:
            return "global view"
        kind = {Source.tiles: "group", Source.detail: "detail group", Source.spatial: "spatial group"}
        return f"{kind.get(self.source, 'tap')} {self.group}"

    def __str__(self) -> str:
        return f"{self.what} -> {self.host.value} layer {self.layer}{OPERATORS[self.operator]}"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A plan as a person writes it; `stacking.plan.Plan` is the same, resolved and validated.

    The schedule ``group k -> layer start_layer + k * interval`` of ``host`` comes first; ``injections`` lists
    whatever a schedule cannot say. ``groups: 0`` is no schedule at all.
    """

    name: str = "???"
    tiles: int = 4  # largest number of tiles an image becomes; 0: the global view alone
    grid: GridRule = GridRule.best_fit
    resize: Resize = Resize.stretch
    detail: int = 1  # each view is enlarged so many times a side, and cut again; 1: it is not
    encoding: Encoding = Encoding.separate
    pooling: int = 1  # side of the squares of tokens that become one: averaged, unless the projector joins them
    taps: list[int] = field(default_factory=list)  # hidden states that Source.tap reads; -1: the feature
    dealing: Dealing = Dealing.strided_2d
    sequence: Sequence = Sequence.global_view
    order: Order = Order.by_group
    unfilled: Unfilled = Unfilled.leave_out
    newline: Newline = Newline.none
    source: Source = Source.tiles
    host: Host = Host.llm
    start_layer: int = 1
    interval: int = 1  # 0 adds all groups before one layer, with collisions: sum
    groups: int = 4
    operator: Operator = Operator.add
    overflow: Overflow = Overflow.refuse
    collisions: Collisions = Collisions.refuse
    injections: list[InjectionConfig] = field(default_factory=list)
