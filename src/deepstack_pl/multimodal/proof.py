"""What is shown of an exported folder, each time one is written: a model loaded from it against the run's own.

A plain `transformers` call loads it. One prompt with an image and one without are read; nothing of a corpus is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from deepstack_pl.language.template import UserText
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.multimodal.tensor_files import TensorFiles
from deepstack_pl.stacking.config import Host
from deepstack_pl.stacking.injection import NOTHING
from deepstack_pl.stacking.plan import Plan
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import full_grid_size

QUESTION = "What is this?"
NEW_TOKENS = 8
_ROWS = {Host.llm: "group_rows", Host.vit: "vit_rows"}  # what says where a host's groups go


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim about the folder, and what was found."""

    claim: str
    found: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Inputs of a prompt with an image, and of one without (None where the template can write none)."""

    picture: dict[str, Tensor]
    text: dict[str, Tensor] | None

    @classmethod
    def of(cls, processor: DeepStackProcessor) -> "Probe":
        """``processor``'s inputs; its limit of positions is lifted, since the image fills the plan's largest grid."""
        processor.max_length = 2**31
        picture = processor(f"<image>{QUESTION}", [probe_image(processor.plan, processor.vision)])
        writes_text = processor.template.user_text is not UserText.images_only
        return cls(dict(picture), dict(processor(QUESTION)) if writes_text else None)

    def logits(self, model: DeepStackForConditionalGeneration) -> list[Float[Tensor, "_ _ v"]]:
        """The logits of each prompt, in float32."""
        return [read(model, inputs) for inputs in (self.picture, self.text) if inputs is not None]


def probe_image(plan: Plan, vision: VisionConfig) -> Image.Image:
    """An image that fills the plan's largest grid, of squares in colours of their own."""
    width, height = (pixels * plan.detail for pixels in full_grid_size(plan, vision))
    shape = (height // vision.patch_size, width // vision.patch_size, 3)
    squares = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def read(model: DeepStackForConditionalGeneration, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b t v"]:
    """The logits of one pass, in float32."""
    return model(**inputs, use_cache=False).logits.float()


def load(folder: Any) -> DeepStackForConditionalGeneration:
    """The model as a user loads it."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert isinstance(model, DeepStackForConditionalGeneration)
    return model


def prove(
    folder: Any,
    probe: Probe,
    run: list[Float[Tensor, "_ _ v"]],
    tolerance: float,
) -> list[Proof]:
    """Load ``folder`` and show that it holds the run's model.

    Args:
        run: the run's logits; in float32 where adapters were merged or the dtype changed.
        tolerance: by how much of the largest the folder's may differ; 0 where they must be equal.

    Raises:
        ValueError: a claim does not hold.
    """
    model = load(folder)
    return [
        _processor(Probe.of(AutoProcessor.from_pretrained(folder)), probe),
        same("logits = the run's", probe.logits(model), run, tolerance),
        *_injections(model, probe),
        _text(model, probe),
        _generation(model, probe),  # last: it goes on in float32
    ]


def _processor(loaded: Probe, run: Probe) -> Proof:
    for one, two in ((loaded.picture, run.picture), (loaded.text or {}, run.text or {})):
        differ = sorted(one.keys() ^ two.keys()) or [name for name in two if not torch.equal(one[name], two[name])]
        if differ:
            raise _refuse(f"its processor makes other {', '.join(differ)} of the same prompt")
    return Proof("inputs = the run's", f"{len(run.picture)} tensors")


def same(claim: str, found: list[Tensor], run: list[Tensor], tolerance: float) -> Proof:
    """Logits are the run's, within ``tolerance`` of the largest."""
    apart = _apart(found, run)
    if not apart <= tolerance:
        raise _refuse(
            f"{claim} does not hold: they are {apart:.1e} of the largest apart, and {tolerance:.0e} is allowed. "
            "--dtype float32 rounds nothing"
        )
    return Proof(claim, "bit by bit" if apart == 0 else f"within {apart:.1e} of the largest")


def stored_whole(folder: Path, model: DeepStackForConditionalGeneration) -> Proof:
    """The files hold the model's tensors, bit by bit."""
    files, state = TensorFiles(folder), model.state_dict()
    wrong = sorted(name for name in files if name not in state or not torch.equal(files[name], state[name]))
    if wrong:
        raise _refuse(f"{len(wrong)} tensors on disk are not those that were written, the first being {wrong[0]}")
    return Proof("tensors on disk = the model's", f"{len(files)}")


def _injections(model: DeepStackForConditionalGeneration, probe: Probe) -> list[Proof]:
    """Leaving a host's groups out changes what is said; else the plan would be a drawing."""
    hosts = [host for host in Host if model.plan.at(host)]
    if not hosts:
        return [Proof("without injections", f"plan {model.plan.name} has none")]
    base, proofs = read(model, probe.picture), []
    for host in hosts:
        rows = torch.full_like(probe.picture[_ROWS[host]], NOTHING)
        change = float((read(model, {**probe.picture, _ROWS[host]: rows}) - base).abs().max())
        if not change > 0:
            closed = ", for its gates are closed: train it until they open" if model.plan.gated(host) else ""
            raise _refuse(
                f"leaving out what plan {model.plan.name} injects into the {host.value} changes no logit{closed}"
            )
        proofs.append(Proof(f"without injections into the {host.value}", f"logits change by {change:.2g}"))
    return proofs


def _text(model: DeepStackForConditionalGeneration, probe: Probe) -> Proof:
    if probe.text is None:
        return Proof("a prompt without an image", "the template can write none")
    new = _generate(model, probe.text, use_cache=True)
    return Proof("a prompt without an image", f"{len(new)} tokens")


def _generation(model: DeepStackForConditionalGeneration, probe: Probe) -> Proof:
    """In float32: in halves two tokens are often equally likely, and which one wins says nothing of the cache."""
    cached, whole = (_generate(model.float(), probe.picture, use_cache=use) for use in (True, False))
    if cached != whole:
        raise _refuse(f"greedy generation with a cache gives {cached}, and without one {whole}")
    return Proof("generation with a cache = without", f"{len(cached)} tokens")


def _generate(model: DeepStackForConditionalGeneration, inputs: Mapping[str, Tensor], *, use_cache: bool) -> list[int]:
    generator: Any = model  # transformers types generate() for a protocol that its own models do not meet
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": use_cache}
    ids = generator.generate(**inputs, **settings)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def _apart(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, two, strict=True))


def _refuse(what: str) -> ValueError:
    return ValueError(
        f"The exported folder is not the run's model: {what}. Nothing was left of it; the run is as it was."
    )
