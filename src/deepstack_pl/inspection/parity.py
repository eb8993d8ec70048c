"""Parity: what this model makes of a published case's inputs, against what the published code made of them.

Everything is built by the product's own code: the configuration and the weights come through the conversion, views and
batch are those of training and generation. What a layer sees is observed by a hook, so that injections are included.

Bounds are for float32 on a CPU, between attention implementations and releases of the libraries below; they stand far
above rounding (logits 3e-6, layer inputs 1.1e-5 at the most) and far below a group on the wrong layer (tenths).
"""

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from deepstack_pl.batch import MultimodalBatch, PadSide, Sample, collate
from deepstack_pl.inspection.measured import Measured, Quantity, measure, refused, same
from deepstack_pl.inspection.stored import StoredCase, cases_of, read_case
from deepstack_pl.language.config import TooLong
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.published.configuration import read_config, unread_keys
from deepstack_pl.multimodal.published.keys import rename_to_ours, rename_to_published
from deepstack_pl.multimodal.tensor_files import TensorFiles
from deepstack_pl.stacking.mosaic import best_grid
from deepstack_pl.vision.config import VisionConfig
from deepstack_pl.vision.views import normalise

__all__ = ["CaseResult", "cases_of", "run_case"]

IMAGE_TOKEN = -200  # the published placeholder
VIEWS, HIDDEN, LOSS, GRADIENT, RELATIVE = 1e-6, 2e-5, 2e-6, 1e-6, 1e-4
BOUNDS = (
    f"bounds: grids and greedy ids exact, views {VIEWS:.0e}, layer inputs and logits {HIDDEN:.0e}, loss {LOSS:.0e}, "
    f"gradients {GRADIENT:.0e} + {RELATIVE:.0e} of each number (the tower's k_proj.bias without the second)"
)
_PARTS = {"model.vision_tower.": "tower", "model.mm_projector.": "projector", "model.image_newline": "newline"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What came of one case.

    Attributes:
        rows: every stored tensor, compared.
        error: why the case could not be run; empty where it could.
        notes: what was stored and not read.
    """

    name: str
    rows: tuple[Measured, ...] = ()
    error: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error and bool(self.rows) and all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        head = {"case": self.name, "ok": self.ok, "error": self.error, "notes": list(self.notes)}
        return {**head, "seconds": round(self.seconds, 2), "rows": [row.to_dict() for row in self.rows]}


def run_case(folder: Path, name: str, *, attention: str = "sdpa") -> CaseResult:
    """Run case ``name`` of ``folder`` and compare everything that is stored. Never raises: other cases must go on."""
    begun = time.perf_counter()
    try:
        case = read_case(folder, name)
        rows = _compare(case, attention)
    except Exception as error:
        return CaseResult(name=name, error=_sentence(error), seconds=time.perf_counter() - begun)
    unread = [f"{key} of config.json" for key in unread_keys(case.published)]
    unread += [f"{key} of meta.json" for key in case.unread]
    notes = tuple(f"{what} is not read" for what in unread)
    return CaseResult(name=name, rows=tuple(rows), notes=notes, seconds=time.perf_counter() - begun)


def build(case: StoredCase, attention: str) -> DeepStackForConditionalGeneration:
    """The case's model with the case's weights.

    Raises:
        ValueError: its configuration cannot be expressed, or the checkpoint is not that model's.
    """
    config = read_config(case.published, case.tower, case.pixels, image_token_id=IMAGE_TOKEN)
    config._attn_implementation = attention
    model = DeepStackForConditionalGeneration(config).float().eval()  # config.json may say another type
    renamed = rename_to_ours(TensorFiles(case.checkpoint), config)
    own: dict[int, set[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        own.setdefault(id(tensor), set()).add(key)  # tied tensors are one, and may be stored once
    missing = sorted(min(keys) for keys in own.values() if not keys & renamed.keys())
    left_over = sorted(renamed.keys() - set().union(*own.values()))
    reshaped = [
        f"{k} {list(t.shape)}" for k, t in model.state_dict().items() if k in renamed and renamed[k].shape != t.shape
    ]
    if missing or left_over or reshaped:
        raise ValueError(
            f"{case.checkpoint} does not fit config.json: missing {missing[:3]}, left over {left_over[:3]}, of another "
            f"shape than {reshaped[:3]}. Is it another case's?"
        )
    model.load_state_dict(renamed, strict=False)
    return model


def samples_of(case: StoredCase, model: DeepStackForConditionalGeneration) -> list[Sample]:
    """Every row of the case, preprocessed and expanded as in training."""
    samples = []
    for row, (ids, labels, file) in enumerate(zip(case.ids, case.labels, case.images, strict=True)):
        sample = make_sample(
            f"{case.name}/{row}",
            ids,
            labels,
            [_open(file)] if file else [],
            plan=model.plan,
            vision=model.config.typed_vision(),
            image_token_id=IMAGE_TOKEN,
            max_length=model.config.sample_max_length,
            too_long=TooLong(model.config.sample_too_long),
        )
        samples.append(sample)
    return samples


def _compare(case: StoredCase, attention: str) -> list[Measured]:
    model = build(case, attention)
    samples = samples_of(case, model)
    rows = [*_grids(case, model), *_views(case, samples, model.config.typed_vision())]
    rows += _forward(case, model, _batch(model, samples, PadSide.right))
    if any(ids is not None for ids in case.greedy):
        rows += _greedy(case.greedy, model, samples)
    rows += [
        refused(Quantity.unknown, key, "is stored, but nothing here knows how to compare it") for key in case.unknown
    ]
    return rows


def _grids(case: StoredCase, model: DeepStackForConditionalGeneration) -> list[Measured]:
    """The grid of every sample with an image, and that its picture is the one that was stored."""
    plan, size = model.plan, model.config.typed_vision().image_size
    ours, stored, rows = [], [], []
    for row, file in enumerate(case.images):
        if file is None:
            continue
        width, height = _open(file).size
        if case.sizes[row] not in (None, (width, height)):
            raise ValueError(
                f"{file} is {width}x{height} pixels, but meta.json says {case.sizes[row]}. Is it another sample's?"
            )
        if case.grids[row] is not None:
            fits = best_grid(width, height, tile=size, tiles=plan.tiles, rule=plan.grid) if plan.tiles else (1, 1)
            ours.append(fits)
            stored.append(case.grids[row])
    if ours:
        rows.append(same(Quantity.grids, "grids", ours, stored))
    return rows


def _views(case: StoredCase, samples: list[Sample], vision: VisionConfig) -> list[Measured]:
    """Normalised, against those that are stored."""
    rows = []
    for row, image in enumerate(case.images):
        name, stored = f"views.{row}", case.views.get(row)
        if image is not None and stored is not None:
            axes = ("view", "channel", "y", "x")
            rows.append(measure(Quantity.views, name, normalise(samples[row].views, vision), stored, VIEWS, axes))
        elif image is not None:
            rows.append(refused(Quantity.views, name, "is not stored, but the sample has an image: store its views"))
        elif stored is not None and stored.any():
            reason = "the sample has no image, but the stored views are not zero"
            rows.append(refused(Quantity.views, name, reason))
    return rows


def _forward(case: StoredCase, model: DeepStackForConditionalGeneration, batch: MultimodalBatch) -> list[Measured]:
    """Layer inputs, logits and loss of one pass over the whole batch, and gradients of one more back."""
    seen: dict[int, Tensor] = {}

    def capture(number: int):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[number] = args[0].detach()

        return hook  # registered after the injection's, so that it sees what the layer sees

    layers = decoder_layers(model.language_model)
    handles = [layer.register_forward_pre_hook(capture(number)) for number, layer in enumerate(layers)]
    with torch.set_grad_enabled(bool(case.gradients)):
        output = model(**batch.model_inputs())
    for handle in handles:
        handle.remove()  # generation would be observed, too
    valid, rows = batch.attention_mask, []
    for number, stored in case.layer_inputs.items():
        name = f"layer_input.{number}"
        if number not in seen:
            reason = f"is stored, but the model has layers 0 to {len(layers) - 1}"
            rows.append(refused(Quantity.layer_inputs, name, reason))
            continue
        axes = ("sample", "position", "channel")
        rows.append(measure(Quantity.layer_inputs, name, seen[number], stored, HIDDEN, axes, valid=valid))
        if number == 0 and rows[-1].ok and stored[~valid].any():  # padding is zero vectors there
            rows[-1] = refused(Quantity.layer_inputs, name, "a stored sample has more positions than ours")
    axes = ("sample", "position", "id")
    rows.append(measure(Quantity.logits, "logits", output.logits, case.logits, HIDDEN, axes, valid=valid))
    rows.append(measure(Quantity.loss, "loss", output.loss.reshape(1), case.loss.reshape(-1), LOSS, ("entry",)))
    if case.gradients:
        output.loss.backward()
        rows += _gradients(case.gradients, model)
    return rows


def _gradients(stored: dict[str, Tensor], model: DeepStackForConditionalGeneration) -> list[Measured]:
    """Every stored gradient, under its published key; one that we have not is a failure."""
    named = model.named_parameters(remove_duplicate=False)
    grads = rename_to_published({key: p.grad for key, p in named if p.grad is not None}, model.config)
    rows = []
    for key, theirs in stored.items():
        part = next((part for prefix, part in _PARTS.items() if key.startswith(prefix)), "LLM")
        name = f"grad.{key}"
        if key not in grads:
            rows.append(refused(Quantity.gradients, name, "is stored, but ours has no such gradient", part=part))
            continue
        # The keys' bias has no gradient in the tower but for rounding: every query sees it alike.
        only_rounding = part == "tower" and key.endswith("k_proj.bias")
        bound = GRADIENT + (0 if only_rounding else RELATIVE) * theirs.double().abs()
        axes = [f"axis {axis} at" for axis in range(theirs.ndim)]
        rows.append(measure(Quantity.gradients, name, grads[key], theirs, bound, axes, part=part))
    return rows


def _greedy(
    stored: list[list[int] | None], model: DeepStackForConditionalGeneration, samples: list[Sample]
) -> list[Measured]:
    """Each sample alone, as stored; then all together, padded on the left, which must change nothing."""
    wanted = [(row, ids) for row, ids in enumerate(stored) if ids is not None]
    rows = []
    for row, ids in wanted:
        answer = _answers(model, [samples[row]], len(ids))[0]
        rows.append(same(Quantity.greedy, f"greedy of sample {row}", answer, ids))
    if len(wanted) > 1:
        together = _answers(model, [samples[row] for row, _ in wanted], max(len(ids) for _, ids in wanted))
        for (row, ids), answer in zip(wanted, together, strict=True):
            rows.append(same(Quantity.greedy, f"greedy of sample {row} in a batch", answer[: len(ids)], ids))
    return rows


def _answers(model: DeepStackForConditionalGeneration, samples: list[Sample], count: int) -> list[list[int]]:
    batch = _batch(model, samples, PadSide.left)
    inputs = {key: value for key, value in batch.model_inputs().items() if key not in ("labels", "position_ids")}
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, use_cache=True, eos_token_id=None)  # pyright: ignore
    return ids[:, batch.input_ids.shape[1] :].tolist()


def _batch(model: DeepStackForConditionalGeneration, samples: list[Sample], side: PadSide) -> MultimodalBatch:
    patches = model.config.typed_vision().patches_per_side
    return collate(
        samples,
        pad_id=0,
        side=side,
        tokens_per_view=(patches // model.plan.pooling) ** 2,
        patches_per_view=patches**2,
    )


def _open(file: Path) -> Image.Image:
    """The picture as the published loader opens it, which drops transparency where `as_rgb` puts white behind it."""
    with Image.open(file) as image:
        return image.convert("RGB")


def _sentence(error: Exception) -> str:
    """What users are told; of a mistake of our own also where it was made."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
