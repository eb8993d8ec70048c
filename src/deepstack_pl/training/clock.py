"""A clock that is read where one part of a step hands on to the next: forward by the modules' hooks, backward as the
gradient arrives there.

Lightning's profilers time its own hooks, in which forward and backward are one; torch's records every kernel, and slows
what it records.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

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


class StepClock:
    """Takes one step apart: `watch`, then for each micro-batch `mark` of its start, the end of its backward pass and
    its own end, then `read`. On a GPU the times are the device's own.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._marks: list[tuple[str, Any]] = []

    @property
    def watching(self) -> bool:
        """Whether a step is being taken apart."""
        return bool(self._hooks)

    def read(self, waited: float) -> dict[str, float]:
        """Seconds of each of `PARTS`, of which ``waited`` for data; the model is let go."""
        self.let_go()
        found, self._marks = seconds_by_part(self._marks, waited), []
        return found

    def let_go(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def mark(self, name: str) -> None:
        """This point is reached now."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def watch(self, model: DeepStackForConditionalGeneration) -> None:
        """From the next forward pass of ``model`` on."""
        self._marks = []
        decoder = model.get_decoder()

        def marks(name: str) -> Callable[..., None]:
            return lambda *_: self.mark(name)

        def entered(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.mark("decoder begins")
            self._when_it_arrives(kwargs["inputs_embeds"], "gradient of embeddings")

        def encoded(module: Any, args: Any, output: list[Tensor]) -> None:
            self.mark("vision")
            for feature in output:
                self._when_it_arrives(feature, "gradient of features")

        def decoded(module: Any, args: Any, output: Any) -> None:
            self.mark("decoder")
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
            tensor.register_hook(lambda gradient: self.mark(name))


def seconds_by_part(marks: list[tuple[str, Any]], waited: float) -> dict[str, float]:
    """From the marks of a step's micro-batches, in the order in which they were reached, to seconds of each part.

    The tower has no backward pass where nothing of it learns, and the projector none where neither does: what is left
    of the backward pass is that of the last part whose gradient was still to come.
    """
    if marks and isinstance(marks[-1][1], torch.cuda.Event):
        marks[-1][1].synchronize()
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
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
    return spent | {"data": waited}
