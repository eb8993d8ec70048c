"""Whether a model whose weights were shared out is still the one that the receipt is of.

The receipt takes the model apart; shares cannot be. So the whole model answers a batch before, with its injections and
without them, and the shared one must answer the same.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deepstack_pl.inspection.probe import probe_batch, quiet
from deepstack_pl.inspection.record import ReceiptError
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.injection import NOTHING

_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of logits, in shares of their largest


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a model says to the receipt's batch.

    Attributes:
        whole: logits.
        bare: the same without any group.
        added: for each injection its place, and the size of what it added.
    """

    whole: Float[Tensor, "b t v"]
    bare: Float[Tensor, "b t v"]
    added: dict[str, float]


def testify(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> Testimony:
    """Ask ``model``; where its weights are shared out all processes must."""
    batch = probe_batch(model, processor)
    inputs = batch.model_inputs()
    nothing = {name: torch.full_like(inputs[name], NOTHING) for name in ("group_rows", "vit_rows")}
    with quiet(model), torch.no_grad():
        output = model(**inputs, use_cache=False, record=True)
        bare = model(**{**inputs, **nothing}, use_cache=False).logits
    added = {str(trace.injection): float(trace.added_rms) for trace in output.record}
    return Testimony(output.logits.float().cpu(), bare.float().cpu(), added)


def compare(before: Testimony, after: Testimony, dtype: torch.dtype) -> str:
    """What was found, in a sentence.

    Raises:
        ReceiptError: the answers differ by more than computing in ``dtype`` explains.
    """
    scale = float(before.whole.abs().max())
    off = float((before.whole - after.whole).abs().max()) / scale
    effect, now = (float((each.whole - each.bare).abs().max()) / scale for each in (before, after))
    bound = _BOUNDS[dtype]
    lost = [place for place, size in before.added.items() if size and not after.added.get(place)]
    if lost or off > bound or abs(effect - now) > 2 * bound or (effect and not now):
        raise ReceiptError(
            f"the model whose weights were shared out is not the one that was built: logits differ by {off:.1e} of "
            f"their largest (at most {bound:.0e}), the injections change them by {now:.1e} (before: {effect:.1e})"
            f"{f', and {lost} add nothing any more' if lost else ''}. Train with strategy=ddp, and report this."
        )
    return (
        f"shared out over the processes: logits as before, within {off:.1e} of their largest; "
        f"without injections they differ by {now:.1e}"
    )
