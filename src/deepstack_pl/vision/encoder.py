"""Views to visual tokens, with injections on the way: DeepStack-V (paper, section 3.3; method B).

Axes: ``v`` views (global views first, then all others), ``k`` views that reach the feature, ``p2`` patches of a view,
``h`` groups entering the tower, ``m`` patches of all global views, ``d`` width.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from deepstack_pl.stacking.config import Encoding, Host
from deepstack_pl.stacking.injection import Traces, inject
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.towers import build_tower
from deepstack_pl.vision.views import normalise


class VisionEncoder(nn.Module):
    """Runs a tower's blocks up to the tapped layer, injecting as the plan says.

    The loop is our own because open_clip's takes no arguments through: a side channel gives wrong gradients under
    activation checkpointing, with an equal loss.
    """

    def __init__(self, config: VisionConfig, plan: Plan) -> None:
        super().__init__()
        assert plan.vit_layers == config.tap
        self.tower = build_tower(config)
        self.plan = plan

    def forward(
        self,
        views: UInt8[Tensor, "v 3 s s"] | Float[Tensor, "v 3 s s"],
        vit_rows: Int[Tensor, "h m"],
        scales: Float[Tensor, " gated"] | None = None,
        traces: Traces | None = None,
    ) -> list[Float[Tensor, "k p2 d"]]:
        """The selected hidden state without the class token; then those that the plan taps.

        ``views`` are levels 0 to 255 (uint8), normalised here in float32 and only then brought to the weights' dtype;
        float views are taken as normalised already, as gradients to pixels need them.
        Groups are dealt from the tiles as they stand before the first injected layer; from there on tiles go along
        only where the plan needs their features too. Views that nothing reads are not run.
        """
        prefix, injections = self.tower.prefix, self.plan.at(Host.vit)
        groups, gated = self.plan.groups(Host.vit), self.plan.gated(Host.vit)
        images = vit_rows.shape[1] // self.tower.config.patches_per_side**2
        tiles = bool(injections) or self.plan.tiles_reach_feature or self.plan.encoding is Encoding.one_pass
        pixels = normalise(views if tiles else views[:images], self.tower.config).to(self.tower.dtype)
        if self.plan.encoding is Encoding.one_pass:
            return [self._one_pass(pixels, images)]
        hidden = self.tower.embed(pixels)
        sources = hidden
        tapped: dict[int, Tensor] = {}  # dict[int, Tensor]() would break torch.compile's graph
        for layer in range(self.plan.vit_layers + 1):
            if injections and layer == min(injections):
                sources = hidden[:, prefix:].flatten(0, 1)
                if not self.plan.tiles_reach_feature:
                    hidden = hidden[:images]
            for injection in injections.get(layer, ()):
                rows = self._spread(vit_rows[groups.index(injection.dealt)], hidden)
                scale = scales[gated.index(injection)] if scales is not None and injection in gated else None
                hidden = inject(hidden, sources, rows, injection, scale, traces)
            if layer in self.plan.taps:
                tapped[layer] = hidden if self.plan.tiles_reach_feature else hidden[:images]
            if layer < self.plan.vit_layers:
                hidden = self.tower.run(layer, hidden)
        return [hidden[:, prefix:], *(tapped[tap][:, prefix:] for tap in self.plan.taps)]

    def _one_pass(self, pixels: Float[Tensor, "v 3 s s"], images: int) -> Float[Tensor, "k p2 d"]:
        """Global views by themselves, each image's tiles as one enlarged image, cut up again afterwards."""
        prefix, side, patches = self.tower.prefix, isqrt(self.plan.most_tiles), self.tower.config.patches_per_side
        small, large = self.tower.embed(pixels[:images]), self.tower.embed_together(pixels[images:], (side, side))
        for layer in range(self.plan.vit_layers):
            small, large = self.tower.run(layer, small), self.tower.run(layer, large)
        cut = rearrange(large[:, prefix:], "i (r h c w) d -> (i r c) (h w) d", r=side, c=side, h=patches, w=patches)
        return torch.cat([small[:, prefix:], cut])

    def _spread(self, rows: Int[Tensor, " m"], hidden: Float[Tensor, "k t d"]) -> Int[Tensor, "k t"]:
        """Rows over all tokens of all views in flight: nothing for class tokens and tiles."""
        patches = hidden.shape[1] - self.tower.prefix
        per_image = rows.view(-1, patches)
        return F.pad(per_image, (self.tower.prefix, 0, 0, hidden.shape[0] - per_image.shape[0]), value=-1)
