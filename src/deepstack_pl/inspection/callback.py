"""The receipt before step 0, and TensorBoard's pages. Both read; taking them away changes no weight."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from deepstack_pl.batch import Record
from deepstack_pl.inspection.dealt import dealt_figure
from deepstack_pl.inspection.inside import Inside, look_inside
from deepstack_pl.inspection.inside_figures import inside_figures
from deepstack_pl.inspection.pages import page_figure
from deepstack_pl.inspection.plots import plan_figure, to_pixels
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import Receipt
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.processes import whole


class Parts(Protocol):
    """The trainable-parts table."""

    def markdown(self) -> str: ...


class Trained(Protocol):
    """A LightningModule of ours: rooms on one floor do not see each other."""

    @property
    def network(self) -> DeepStackForConditionalGeneration: ...
    @property
    def parts(self) -> Parts | None: ...


class Answer(Protocol):
    """One scored answer, as evaluation writes it."""

    @property
    def key(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def facts(self) -> tuple[str, ...]: ...
    @property
    def correct(self) -> tuple[bool, ...]: ...


class Validation(Protocol):
    """What shows the newest validation: evaluation's callback."""

    @property
    def last_step(self) -> int: ...
    @property
    def pages(self) -> Sequence[tuple[Record, Answer]]: ...


class InspectionCallback(lightning.Callback):
    """The receipt before step 0; then pages for TensorBoard, where there is one.

    At the start the plan's drawing, the receipt and the parts table; after each validation a handful of answered pages,
    and how strong each injection is on them. ``validation`` is asked after every step whether it is newer than what was
    shown, so it must come earlier among the callbacks.

    Attributes:
        receipt: taken at the start, of the weights as they then are, unless one has been put here before.
    """

    def __init__(
        self, processor: DeepStackProcessor, validation: Validation | None = None, *, config: str = ""
    ) -> None:
        """``config``: the run's, as text to show."""
        self.processor = processor
        self.config = config
        self.validation = validation
        self.receipt: Receipt | None = None
        self._shown = -1

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Prove the plan.

        Raises:
            ReceiptError: an injection does not happen as planned.
        """
        model, parts = _ours(pl_module)
        self.receipt = self.receipt or take_receipt(model, self.processor)
        for writer in _writers(trainer):
            plan, step = model.plan, trainer.global_step
            picture = to_pixels(plan_figure(plan, self.processor.tokens_per_view))
            writer.add_image("plan/drawing", picture, step, dataformats="HWC")
            writer.add_text("plan/text", _as_code(plan.draw()), step)
            writer.add_text("plan/receipt", self.receipt.markdown(), step)
            if self.config:
                writer.add_text("plan/config", _as_code(self.config), step)
            if parts is not None:
                writer.add_text("plan/parts", parts.markdown(), step)
        self.receipt.require()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.validation is None or self.validation.last_step <= self._shown:
            return
        self._shown = self.validation.last_step
        writers = _writers(trainer)
        if not self.validation.pages:
            return
        network, records, found = _ours(pl_module)[0], [r for r, _ in self.validation.pages], None
        with whole(network):
            if writers:
                found = look_inside(network, self.processor, records)
        for writer in writers:
            if found is not None:
                self._inside(writer, found, self.validation.pages)
            for number, (record, answer) in enumerate(self.validation.pages):
                self._page(writer, f"pages/{answer.kind} {number}", record, answer)

    def _inside(self, writer: SummaryWriter, found: Inside, pages: Sequence[tuple[Record, Answer]]) -> None:
        for name, value in found.scalars().items():
            writer.add_scalar(name, value, self._shown)
        page = next((r.images[0] for r, _ in pages if r.images), None)
        figures = inside_figures(found, self.processor.plan, page)
        dealt = dealt_figure(page, self.processor) if page is not None else None
        if dealt is not None:
            figures["pages/as it is dealt"] = dealt
        for tag, figure in figures.items():
            writer.add_image(tag, to_pixels(figure), self._shown, dataformats="HWC")
        if found.note:
            writer.add_text("attention/note", found.note, self._shown)

    def _page(self, writer: SummaryWriter, tag: str, record: Record, answer: Answer) -> None:
        text = f"**{answer.key}**\n\n{answer.prompt}\n\nprediction: `{answer.prediction}`\n\nanswer: `{answer.answer}`"
        writer.add_text(tag, text.replace("<", "&lt;"), self._shown)
        if not record.images:
            return
        figure = page_figure(
            record.images[0],
            global_view(self.processor, record),
            prompt=answer.prompt,
            prediction=answer.prediction,
            answer=answer.answer,
            facts=answer.facts,
            correct=answer.correct,
            title=f"{answer.key}, {answer.kind}, step {self._shown}",
        )
        writer.add_image(tag, to_pixels(figure), self._shown, dataformats="HWC")


def global_view(processor: DeepStackProcessor, record: Record) -> Any:
    """The first image's global view as the model sees it, from 0 to 1, ``[s, s, 3]``."""
    return (processor.prompt(record).views[0].permute(1, 2, 0) / 255).numpy()


def _as_code(text: str) -> str:
    """Markdown that keeps its lines."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _writers(trainer: lightning.Trainer) -> list[SummaryWriter]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _ours(module: Any) -> tuple[DeepStackForConditionalGeneration, Parts | None]:
    trained: Trained = module
    return trained.network, trained.parts
