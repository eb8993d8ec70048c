"""The one face of every tower: patches, positions, what is put in front of them, blocks.

Axes: ``v`` views, ``p2`` patches of a view in raster order, ``t`` tokens of a view, ``i`` enlarged images, ``d`` width.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from deepstack_pl.vision.config import VisionConfig


class Tower(nn.Module, ABC):
    """A vision transformer, taken apart so that the encoder can run its blocks one by one.

    Attributes:
        config: its values.
        prefix: tokens before the patches (class token, registers).
        blocks: what `run` runs.
    """

    config: VisionConfig
    prefix: int
    blocks: nn.ModuleList

    @abstractmethod
    def patches(self, pixels: Float[Tensor, "v 3 y x"]) -> Float[Tensor, "v h w d"]:
        """Embeddings of the patches of pictures of any size, without positions."""

    @abstractmethod
    def positions(self) -> Float[Tensor, "p2 d"]:
        """What is added to each patch of a view for its place."""

    @abstractmethod
    def finish(self, tokens: Float[Tensor, "v n d"]) -> Float[Tensor, "v t d"]:
        """Patches with positions to hidden state 0: prefix tokens in front, normalised where the tower does it."""

    @abstractmethod
    def unreachable(self) -> list[str]:
        """Names of parameters that no feature depends on."""

    @abstractmethod
    def load_pretrained(self) -> None:
        """Take the weights that the configuration names.

        Raises:
            ValueError: they are not at hand, or belong to another architecture.
        """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What views must be cast to: pixels arrive in float32 whatever the weights are."""

    def embed(self, views: Float[Tensor, "v 3 s s"]) -> Float[Tensor, "v t d"]:
        """Hidden state 0."""
        tokens = rearrange(self.patches(views), "v h w d -> v (h w) d")
        return self.finish(tokens + self.positions().to(tokens.dtype))

    def embed_together(self, tiles: Float[Tensor, "v 3 s s"], grid: tuple[int, int]) -> Float[Tensor, "i t d"]:
        """The same of enlarged images: ``grid`` (columns, rows) tiles of each are one, with one set of prefix tokens.

        Positions of patches are interpolated to the larger lattice, bicubic, as the published code meant to (method
        A.6): patches do not overlap, so that those of the tiles are those of the whole.
        """
        columns, rows = grid
        lattice = rearrange(self.patches(tiles), "(i r c) h w d -> i (r h c w) d", r=rows, c=columns)
        square = rearrange(self.positions(), "(h w) d -> 1 d h w", h=self.config.patches_per_side)
        size = [n * self.config.patches_per_side for n in (rows, columns)]
        larger = F.interpolate(square.float(), size=size, mode="bicubic", align_corners=False).to(lattice.dtype)
        return self.finish(lattice + rearrange(larger, "1 d h w -> (h w) d"))

    def run(self, layer: int, hidden: Float[Tensor, "v t d"]) -> Float[Tensor, "v t d"]:
        """One block, from hidden state ``layer`` to the next; ``t`` may be any number of tokens after the prefix."""
        return self.blocks[layer](hidden)

    def _under(self, names: list[str]) -> list[str]:
        """Own parameters of these names, or below them."""
        return [n for n, _ in self.named_parameters() if any(n == name or n.startswith(f"{name}.") for name in names)]


def not_at_hand(config: VisionConfig, error: Exception, key: str) -> ValueError:
    """Weights that could be fetched, but are not here."""
    return ValueError(
        f"vision={config.name}: the weights {config.weights} are not at hand ({type(error).__name__}: "
        f"{str(error).splitlines()[0]}). They come from the Hugging Face hub: connect once, or point vision.{key}. "
        "vision.init=random builds the same architecture with random weights."
    )


def more_than_tensors(config: VisionConfig) -> ValueError:
    """Pickles that would have run something, had they been let; or that are broken."""
    return ValueError(
        f"vision={config.name}: the weights {config.weights} are damaged or hold more than tensors, and nothing of "
        "them was run. Fetch them again, or take a version with safetensors."
    )


def refuse_other_values(config: VisionConfig, source: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Refuse values (conf's, the checkpoint's) that differ: shapes do not show them, and a wrong one changes the
    features in silence.

    Raises:
        ValueError: naming those that do.
    """
    differ = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if differ:
        raise ValueError(
            f"vision={config.name}: conf and {source} disagree (conf, there): {differ}. Correct conf/vision."
        )


def take(own: nn.Module, config: VisionConfig, source: str, loaded: dict[str, Tensor]) -> None:
    """Copy ``loaded`` into ``own``, whole.

    Raises:
        ValueError: names or shapes differ.
    """
    mine = {key: tuple(value.shape) for key, value in own.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in loaded.items()}
    if mine != theirs:
        wrong = sorted(set(mine.items()) ^ set(theirs.items()))[:4]
        raise ValueError(
            f"vision={config.name}: {source} is not the architecture written in conf/vision; first differences: "
            f"{wrong}. Correct width, layers, heads, patch_size, image_size or architecture."
        )
    own.load_state_dict(loaded)
