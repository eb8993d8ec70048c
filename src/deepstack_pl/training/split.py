"""Where the time of a step goes: waiting for data, the tower, projector and dealing, the LLM, the loss, the optimiser.

Lightning's profilers time their own hooks, in which forward and backward are one; torch's records every kernel, and
slows what it records. Here a clock is read where one part hands on to the next, forward by the modules' hooks, backward
as the gradient arrives there.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.processes import from_all, several
from deepstack_pl.training.loader import TimedLoader
from deepstack_pl.training.module import DeepStackModule

PARTS = ("data", "vision", "projector", "llm", "loss", "optimiser", "other")
# What has been done when a mark is reached, and, where the backward pass ends after it, what was done at last.
_DONE = {
    "vision begins": "other",
    "vision": "vision",
    "decoder begins": "projector",
    "decoder": "llm",
    "forward": "loss",
    "gradient of hidden": "loss",
    "gradient of embeddings": "llm",
    "gradient of features": "projector",
    "end": "optimiser",
}
_NEXT = {
    "forward": "loss",
    "gradient of hidden": "llm",
    "gradient of embeddings": "projector",
    "gradient of features": "vision",
}


class StepSplit(lightning.Callback):
    """Logs, every ``every_steps`` steps, the seconds that one step spent on each of `PARTS`: ``split/vision`` and so
    on, forward and backward together, the mean over all processes; of several also ``split_min`` and ``split_max``.

    On a GPU the times are the device's own. Between measured steps nothing is watched, and no number of the run ever
    depends on it.

    Attributes:
        last: the newest measured step's values, by part.
    """

    def __init__(self, every_steps: int = 50) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: measure every 1 or more steps.")
        self.every_steps = every_steps
        self.last: dict[str, float] = {}
        self._hooks: list[RemovableHandle] = []
        self._marks: list[tuple[str, Any]] = []
        self._waited = self._waited_before = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: MultimodalBatch, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        waited = loader.waited if isinstance(loader, TimedLoader) else 0.0
        waited, self._waited_before = waited - self._waited_before, waited
        if (trainer.global_step + 1) % self.every_steps:
            return
        assert isinstance(pl_module, DeepStackModule)
        self._waited += waited
        if not self._hooks:
            self._watch(pl_module.network)
        self._mark("start")

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._hooks:
            self._mark("backward")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        if not self._hooks:
            return
        self._mark("end")
        if trainer.fit_loop._should_accumulate():
            return
        self._unwatch()
        mine = seconds_by_part(self._marks, self._waited)
        self._marks, self._waited = [], 0.0
        every = from_all(mine)
        self.last = {part: sum(each[part] for each in every) / len(every) for part in PARTS}
        logged = {f"split/{part}": value for part, value in self.last.items()}
        if several():
            for name, of in (("min", min), ("max", max)):
                logged |= {f"split_{name}/{part}": of(each[part] for each in every) for part in PARTS}
        for logger in trainer.loggers:  # of a single step: log() would average it with others
            logger.log_metrics(logged, step=trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._unwatch()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._unwatch()

    def _mark(self, name: str) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def _watch(self, model: DeepStackForConditionalGeneration) -> None:
        decoder = model.get_decoder()

        def marks(name: str) -> Callable[..., None]:
            return lambda *_: self._mark(name)

        def entered(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._mark("decoder begins")
            self._when_it_arrives(kwargs["inputs_embeds"], "gradient of embeddings")

        def encoded(module: Any, args: Any, output: list[Tensor]) -> None:
            self._mark("vision")
            for feature in output:
                self._when_it_arrives(feature, "gradient of features")

        def decoded(module: Any, args: Any, output: Any) -> None:
            self._mark("decoder")
            self._when_it_arrives(output.last_hidden_state, "gradient of hidden")

        self._hooks = [
            model.vision_tower.register_forward_pre_hook(marks("vision begins")),
            model.vision_tower.register_forward_hook(encoded),
            decoder.register_forward_pre_hook(entered, with_kwargs=True),
            decoder.register_forward_hook(decoded),
            model.register_forward_hook(marks("forward")),
        ]

    def _when_it_arrives(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._mark(name))

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def seconds_by_part(marks: list[tuple[str, Any]], waited: float) -> dict[str, float]:
    """From the marks of a step's micro-batches, in the order in which they were reached, to seconds of each part.

    The tower has no backward pass where nothing of it learns, and the projector none where neither does: what is left
    of the backward pass is that of the last part whose gradient was still to come.
    """
    if marks and isinstance(marks[-1][1], torch.cuda.Event):
        marks[-1][1].synchronize()
    spent = Counter[str](dict.fromkeys(PARTS, 0.0))
    before, backward = None, "loss"
    for name, at in marks:
        if name == "start":
            before = at
            continue
        assert before is not None, "a micro-batch begins with its start"
        backward = _NEXT.get(name, backward)
        part = backward if name == "backward" else _DONE[name]
        spent[part] += before.elapsed_time(at) / 1000 if isinstance(at, torch.cuda.Event) else at - before
        before = at
    return dict(spent) | {"data": waited}
