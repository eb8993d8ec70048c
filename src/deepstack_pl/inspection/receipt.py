"""The receipt: proof, before step 0, that every injection of the plan happens, where it should, with what it should.

Each injection is tried in five ways on a synthetic batch (one row with one image, one with two, and one without where
the template can write it): it lands on its own images' positions and nowhere else, from its layer on; what it adds
depends on its own image's views alone, and is at every position the token that a slow dealing of them puts there;
the loss has a gradient in it, down to the pixels; leaving its group out changes the logits.

An injection whose gate stands at zero adds nothing yet, rightly: its gate's own gradient is the proof, and everything
else is tried with the gate opened for the length of a pass.

Two things more hold of every plan, an empty one too: the text holds what the plan lays there, token by token, before
the LLM sees it; and both are so for an image that fills a smaller, oblong grid, and does not fill it exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.inspection.content import VIEWS, Laid, lay_out, misdealt, misread
from deepstack_pl.inspection.probe import (
    IMAGES,
    Observed,
    Pictures,
    full_pictures,
    oblong_pictures,
    opened,
    own_gates,
    owners,
    probe_batch,
    quiet,
    replaced,
    run,
    samples_of,
    views_by_source,
    with_others,
    without_group,
)
from deepstack_pl.inspection.record import Receipt, ReceiptError, ReceiptRow
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import Host, Operator
from deepstack_pl.stacking.injection import InjectionTrace
from deepstack_pl.stacking.plan import Injection
from deepstack_pl.vision.config import ViewsBackend


def take_receipt(model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> Receipt:
    """Try every injection of ``model``'s plan. Leaves modes, gradients and random numbers as they were.

    Raises:
        ReceiptError: ``processor`` makes its batches under another plan.
    """
    if processor.plan.digest != model.plan.digest:
        raise ReceiptError(
            f"the processor deals under plan {processor.plan.name} ({processor.plan.digest}), but the model injects "
            f"under plan {model.plan.name} ({model.plan.digest}). Build both from the same values, or load both from "
            "one folder."
        )
    with quiet(model):
        trial = _Trial(model, processor)
        rows = tuple(trial.row(injection) for injection in model.plan.injections)
        return Receipt(model.plan, rows + trial.unplanned(), trial.text())


@dataclass(frozen=True, slots=True)
class _Shown:
    """Pictures, the batch made of them, what the model did with it, and what the plan lays where."""

    pictures: Pictures
    batch: MultimodalBatch
    observed: Observed
    laid: Laid

    @classmethod
    def of(
        cls,
        model: DeepStackForConditionalGeneration,
        pictures: Pictures,
        batch: MultimodalBatch,
        gates: dict[str, Tensor],
        backend: ViewsBackend,
    ) -> "_Shown":
        observed = run(model, batch, gates)
        with replaced(model, gates):
            return cls(pictures, batch, observed, lay_out(model, batch, pictures, backend))

    @property
    def named(self) -> str:
        """The grid, where it is not the full one."""
        columns, rows = self.pictures.grid
        return f" (of an image of {columns} x {rows} tiles)" if len(self.pictures.images) == 1 else ""


class _Trial:
    """The passes that all injections share, and the checks of one."""

    def __init__(self, model: DeepStackForConditionalGeneration, processor: DeepStackProcessor) -> None:
        self.model, self.processor, self.plan = model, processor, model.plan
        self.batch: MultimodalBatch = probe_batch(model, processor)
        self.pictures = full_pictures(self.plan, processor.vision)
        self.own, self.gates = own_gates(model), opened(own_gates(model))
        self.shown = [_Shown.of(model, self.pictures, self.batch, self.gates, processor.backend)]
        self.base = self.shown[0].observed
        oblong = oblong_pictures(self.plan, processor.vision)
        if oblong is not None:
            batch = processor.collate(samples_of([oblong.images], processor)).to(model.device)
            self.shown.append(_Shown.of(model, oblong, batch, self.gates, processor.backend))
        # Passes are compared bit by bit, and attention without gradients takes another path: hence two of this one.
        self.graph = run(model, self.batch, self.gates, gradients=True)
        self.closed = run(model, self.batch, self.own, gradients=True) if self._closed() else None
        places = views_by_source(self.plan, self.pictures)
        self.changed = {
            source: [
                run(model, self.batch, self.gates, {"views": with_others(self.batch, own)}) for own in places[source]
            ]
            for source in {injection.source for injection in self.plan.injections}
        }

    def row(self, injection: Injection) -> ReceiptRow:
        trace = _trace(self.base, injection)
        if trace is None:
            return ReceiptRow(injection, 0, 0, 0.0, 0.0, False, "it left no record: no hook ran where it should")
        owner = owners(self.batch, injection, trace.touched, self.pictures, self.processor)
        gradient, flow = self._gradient(injection, owner)
        zeroed = run(self.model, self.batch, self.gates, self._without(injection))
        change = float((zeroed.logits.float() - self.base.logits.float()).abs().max())
        faults = [
            _landing(trace.touched, owner),
            self._dependence(injection, owner),
            flow,
            self._layer(injection, zeroed),
            "" if change else "leaving its group out does not change a single logit",
            self._content(injection),
        ]
        touched, notes = int(trace.touched.sum()), self._sharing(injection)
        if self.closed is not None and self._is_closed(injection):
            gradient, touched, closed_faults = self._through_gate(injection, self.closed)
            faults += closed_faults
            notes.append("gate closed: proven by its own gradient, and with the gate opened")
        wrong = [fault for fault in faults if fault]
        reason = "; ".join(wrong or notes)
        return ReceiptRow(injection, int((owner >= 0).sum()), touched, gradient, change, not wrong, reason)

    def unplanned(self) -> tuple[ReceiptRow, ...]:
        """Injections that happened without being in the plan, or more often than there."""
        seen = [trace.injection for trace in self.base.traces]
        extra = [i for n, i in enumerate(seen) if i not in self.plan.injections or i in seen[:n]]
        return tuple(ReceiptRow(i, 0, 0, 0.0, 0.0, False, "it happened, but the plan does not say so") for i in extra)

    def _gradient(self, injection: Injection, owner: Tensor) -> tuple[float, str]:
        """Norm of d(loss)/d(added), and what is wrong with it."""
        trace = _trace(self.graph, injection)
        if trace is None:
            return 0.0, "it left a record in one pass and none in another"
        stopped = "no gradient flows from what it adds back to the pixels: its features are detached"
        if not trace.added.requires_grad:
            return 0.0, stopped
        (gradient,) = torch.autograd.grad(self.graph.loss, trace.added, retain_graph=True, allow_unused=True)
        if gradient is None:
            return 0.0, "the loss does not depend on what it adds"
        norms = [float(gradient[owner == image].float().norm()) for image in range(IMAGES)]
        if not all(norms):
            return float(gradient.float().norm()), f"the loss has no gradient at image {norms.index(0.0)}'s positions"
        (pixels,) = torch.autograd.grad(
            trace.added, self.graph.views, grad_outputs=gradient, retain_graph=True, allow_unused=True
        )
        flows = pixels is not None and bool(pixels.any())
        return float(gradient.float().norm()), "" if flows else stopped

    def _through_gate(self, injection: Injection, closed: Observed) -> tuple[float, int, list[str]]:
        """A closed gate: norm of its own gradient, positions touched in spite of it, and what is wrong."""
        name, place = self._gate(injection)
        (gradients,) = torch.autograd.grad(closed.loss, closed.gates[name], retain_graph=True, allow_unused=True)
        gradient = 0.0 if gradients is None else float(gradients[place].abs())
        trace = _trace(closed, injection)
        touched = int(trace.touched.sum()) if trace is not None else 0
        return (
            gradient,
            touched,
            [
                "" if gradient else "its gate is closed and has no gradient: it would never open",
                f"its gate is closed, and yet it touches {touched} positions" if touched else "",
            ],
        )

    def _dependence(self, injection: Injection, owner: Tensor) -> str:
        """Changing one image's views changes what is added at that image's positions, and nowhere else."""
        before, views = _trace(self.base, injection), VIEWS[injection.source]
        for image, observed in enumerate(self.changed[injection.source]):
            after = _trace(observed, injection)
            if before is None or after is None:
                return "it left a record in one pass and none in another"
            differs = (after.added != before.added).any(-1)
            if bool((differs & (owner != image)).any()):
                return f"what it adds outside image {image}'s positions changes with that image's {views}: wrong image"
            if not bool((differs & (owner == image)).any()):
                return (
                    f"what it adds at image {image}'s positions does not depend on that image's {views}: wrong features"
                )
        return ""

    def _content(self, injection: Injection) -> str:
        """What is added at each position is the token that stands there in the group, dealt the slow way."""
        scale = None
        if injection.operator is Operator.gated_add:
            name, place = self._gate(injection)
            scale = self.gates[name][place].tanh()
        for shown in self.shown:
            trace = _trace(shown.observed, injection)
            if trace is None:
                return f"it left no record{shown.named}"
            owner = owners(shown.batch, injection, trace.touched, shown.pictures, self.processor)
            fault = misdealt(trace, owner, shown.laid.groups[injection.host, *injection.dealt], scale)
            if fault:
                return fault + shown.named
        return ""

    def text(self) -> str:
        """What is wrong with the images in the text, as it enters the LLM."""
        for shown in self.shown:
            visual = shown.batch.input_ids == self.processor.image_token_id
            fault = misread(shown.observed.embeds, visual, shown.laid.sequence)
            if fault:
                return fault + shown.named
        return ""

    def _layer(self, injection: Injection, zeroed: Observed) -> str:
        """The first layer whose output differs without the group is the one it is injected before."""
        before, after = self.base.layers, zeroed.layers
        layers = [
            layer for host, layer in before if host is injection.host and before[host, layer] != after[host, layer]
        ]
        first = min(layers, default=None)
        planned: int | None = min(i.layer for i in self._sharers(injection))
        if injection.host is Host.vit and planned == self.plan.vit_layers:
            planned = None  # the selected feature itself: no block comes after
        return "" if first == planned else f"it takes effect at {_named(first)}, not at {_named(planned)}"

    def _without(self, injection: Injection) -> dict[str, Tensor]:
        return without_group(self.batch, injection, self.plan.groups(injection.host))

    def _sharers(self, injection: Injection) -> list[Injection]:
        """Injections of the same group into the same host: they are left out together."""
        return [i for i in self.plan.injections if (i.host, i.dealt) == (injection.host, injection.dealt)]

    def _sharing(self, injection: Injection) -> list[str]:
        others = [str(i.layer) for i in self._sharers(injection) if i != injection]
        return [f"left out together with layer {', '.join(others)}, which shares its group"] if others else []

    def _gate(self, injection: Injection) -> tuple[str, int]:
        return f"gates.{injection.host.value}", self.plan.gated(injection.host).index(injection)

    def _is_closed(self, injection: Injection) -> bool:
        if injection.operator is not Operator.gated_add:
            return False
        name, place = self._gate(injection)
        return float(self.own[name][place]) == 0

    def _closed(self) -> bool:
        return any(self._is_closed(injection) for injection in self.plan.injections)


def _trace(observed: Observed, injection: Injection) -> InjectionTrace | None:
    return next((trace for trace in observed.traces if trace.injection == injection), None)


def _landing(touched: Tensor, owner: Tensor) -> str:
    stray, missed = int((touched & (owner < 0)).sum()), int((~touched & (owner >= 0)).sum())
    if not stray and not missed:
        return ""
    return (
        f"it misses {missed} of its images' {int((owner >= 0).sum())} positions and touches {stray} that are not theirs"
    )


def _named(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"
