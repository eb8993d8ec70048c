"""Which tower sees, and which of its layers is read. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class VisionInit(Enum):
    """Where a tower's weights come from."""

    random = "random"
    pretrained = "pretrained"


class VisionLibrary(Enum):
    """Whose code a tower is."""

    open_clip = "open_clip"  # its own VisionTransformer; with vision.family the timm model that it wraps (SigLIP)
    huggingface = "huggingface"  # transformers: vision.family is one of FAMILIES
    timm = "timm"  # vision.family is a model of timm's that is a VisionTransformer


class ViewsBackend(Enum):
    """What enlarges and shrinks images."""

    pil = "pil"  # Pillow's bicubic filter: the published preprocessing, bit for bit
    torch = "torch"  # torch's antialiased bicubic filter on uint8: several times faster, within 2 of 255 levels


QWEN3_VL = "qwen3_vl_vision"
FAMILIES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", QWEN3_VL)


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """A vision transformer, written out so that plans are checked and meta models built offline."""

    name: str = "???"
    library: VisionLibrary = VisionLibrary.open_clip
    family: str | None = None  # huggingface: model_type of the vision config; timm, open_clip's SigLIP: timm's name
    checkpoint: str | None = None  # huggingface, timm: a hub id or a local folder; needed for init: pretrained
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
    gelu_tanh: bool = False  # with quick_gelu false: GELU's approximation by tanh; both false: GELU itself
    layer_norm_eps: float = 1e-5
    architecture: dict[str, Any] = field(default_factory=dict)  # the library's own values that have no field here
    feature_layer: int = -2  # index into the hidden states 0..layers (0: the embeddings); -2: the last block's input
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])

    def __post_init__(self) -> None:
        if self.mlp_ratio <= 0:
            raise ValueError(f"vision.mlp_ratio={self.mlp_ratio}: blocks are wider inside by it. Say 4.0.")
        if self.image_size % self.patch_size and not self._drops_remainder:
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of vision.patch_size={self.patch_size}: "
                "patches must cover the view exactly."
            )
        if not 0 <= self.tap <= self.layers:
            raise ValueError(
                f"vision.feature_layer={self.feature_layer} names no hidden state of a tower of {self.layers} layers: "
                f"use 0 to {self.layers}, or -1 (after the last block) to {-self.layers - 1}."
            )
        if self.quick_gelu and self.gelu_tanh:
            raise ValueError(
                "vision.gelu_tanh=true with vision.quick_gelu=true: a tower has one activation. Say "
                "vision.quick_gelu=false."
            )
        self._check_library()

    def _check_library(self) -> None:
        library, family = self.library, self.family
        if library is VisionLibrary.huggingface and family not in FAMILIES:
            raise ValueError(
                f"vision.library=huggingface with vision.family={family}: towers of transformers are taken apart by "
                f"family, and known are {', '.join(FAMILIES)}. Checkpoints of SigLIP 2 with one resolution are "
                "siglip_vision_model."
            )
        if library is VisionLibrary.timm and not family:
            raise ValueError(
                "vision.library=timm needs vision.family, the name of a model of timm's: vision.family="
                "vit_base_patch16_224."
            )
        named: dict[str, Any] = {"open_clip_model": self.open_clip_model, "open_clip_weights": self.open_clip_weights}
        unread: dict[str, Any] = {"checkpoint": self.checkpoint} if library is VisionLibrary.open_clip else named
        if library is VisionLibrary.open_clip and not family:
            unread["architecture"] = self.architecture or None
        for key, value in unread.items():
            if value is not None:
                raise ValueError(
                    f"vision.{key}={value}: a tower of vision.library={library.name} does not read it. Leave it out, "
                    "or take another vision=."
                )

    @property
    def _drops_remainder(self) -> bool:
        """SigLIP's 384 pixels are 27 patches of 14, and 6 pixels that no patch sees: published towers do so."""
        return self.family is not None and self.family != QWEN3_VL

    @property
    def tap(self) -> int:
        """Number of blocks that run before the feature is read."""
        return self.feature_layer if self.feature_layer >= 0 else self.layers + 1 + self.feature_layer

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def activation(self) -> str:
        """The activation as transformers calls it."""
        return "quick_gelu" if self.quick_gelu else "gelu_pytorch_tanh" if self.gelu_tanh else "gelu"

    @property
    def weights(self) -> str | None:
        """What ``init: pretrained`` takes, in words; None where it is not named."""
        if self.library is not VisionLibrary.open_clip:
            return self.checkpoint
        named = self.open_clip_model and self.open_clip_weights
        return f"{self.open_clip_weights!r} of open_clip's {self.open_clip_model}" if named else None


def check_weights(vision: VisionConfig) -> None:
    """Refuse a pretrained tower that names no weights.

    Raises:
        ValueError: naming the keys to fill.
    """
    if vision.init is not VisionInit.pretrained or vision.weights:
        return
    if vision.library is VisionLibrary.open_clip:
        raise ValueError(
            f"vision={vision.name}: init is pretrained, but vision.open_clip_model={vision.open_clip_model} and "
            f"vision.open_clip_weights={vision.open_clip_weights} (a tag of open_clip's, or a file). Name both, or set "
            "vision.init=random."
        )
    raise ValueError(
        f"vision={vision.name}: init is pretrained, but vision.checkpoint={vision.checkpoint}. Name a hub id or a "
        "local folder, or set vision.init=random."
    )


def check_one_pass(vision: VisionConfig) -> None:
    """Refuse towers that cannot read all tiles of an image as one enlarged image.

    Raises:
        ValueError: naming the tower and why.
    """
    if vision.family == QWEN3_VL:
        raise ValueError(
            f"model.encoding=one_pass with vision={vision.name}: {QWEN3_VL} turns queries and keys by a patch's place "
            "in its view, not in the enlarged image. Say model.encoding=separate."
        )
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"model.encoding=one_pass with vision={vision.name}: {vision.image_size} pixels are "
            f"{vision.patches_per_side} patches of {vision.patch_size} and a remainder, so that the patches of tiles "
            "are not those of the enlarged image. Say model.encoding=separate."
        )
