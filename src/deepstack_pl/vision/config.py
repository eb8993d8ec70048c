"""Which tower sees, and which of its layers is read. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum


class VisionInit(Enum):
    """Where a tower's weights come from."""

    random = "random"
    pretrained = "pretrained"


class ViewsBackend(Enum):
    """What enlarges and shrinks images."""

    pil = "pil"  # Pillow's bicubic filter: the published preprocessing, bit for bit
    torch = "torch"  # torch's antialiased bicubic filter on uint8: several times faster, within 2 of 255 levels


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """An open_clip vision transformer, written out so that plans are checked and meta models built offline."""

    name: str = "???"
    open_clip_model: str | None = None  # name in open_clip's registry; needed for init: pretrained
    open_clip_weights: str | None = None  # its pretrained tag, or a local file
    init: VisionInit = VisionInit.random
    image_size: int = 336  # side of a view, pixels
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    layer_norm_eps: float = 1e-5
    feature_layer: int = -2  # index into the hidden states 0..layers (0: the embeddings); -2: the last block's input
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of vision.patch_size={self.patch_size}: "
                "patches must cover the view exactly."
            )
        if not 0 <= self.tap <= self.layers:
            raise ValueError(
                f"vision.feature_layer={self.feature_layer} names no hidden state of a tower of {self.layers} layers: "
                f"use 0 to {self.layers}, or -1 (after the last block) to {-self.layers - 1}."
            )

    @property
    def tap(self) -> int:
        """Number of blocks that run before the feature is read."""
        return self.feature_layer if self.feature_layer >= 0 else self.layers + 1 + self.feature_layer

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size
