"""How fast training goes, and how much of the time it waits for data.

Lightning's ThroughputMonitor knows no waiting for data and no padding, counts whatever a callback does between steps
(generation, checkpoints) as training time, and holds it against peaks with sparsity.
"""

import time
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.processes import from_all, several, world
from deepstack_pl.training.flops import FlopsCounter, peak_of
from deepstack_pl.training.loader import TimedLoader
from deepstack_pl.training.module import DeepStackModule

_COUNTED = ("tokens", "supervised", "samples", "positions", "flops", "seconds", "waited")


class Throughput(lightning.Callback):
    """Logs over windows of ``every_steps`` batches, of all processes together:

    * ``speed/tokens_per_second`` that are no padding, ``speed/supervised_tokens_per_second``,
      ``speed/samples_per_second``;
    * ``speed/model_flops_per_second``, as `flops` counts them, and ``speed/mfu``, their share of what the devices could
      do at most, where that is known;
    * ``speed/padding_share`` of the positions that the LLM was given;
    * ``speed/step_seconds`` of a batch and ``speed/data_wait_share``, the mean over processes; of several also the
      least and the most, as ``speed_min/`` and ``speed_max/``, and of ``tokens_per_second`` those of one process.

    Time is that of steps and of waiting; what callbacks do between steps does not count. On an accelerator waiting
    overlaps with computing, so that the share is an upper bound. Nothing waits for the device but the end of a window.

    Attributes:
        last: the newest window's values, by their logged names.
        seconds_training: time of all of this session's steps, waiting for data included; nothing else.
    """

    def __init__(self, every_steps: int = 10, precision: str = "32-true") -> None:
        """``precision``: the trainer's, which says what the device could do."""
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: a window holds at least one step.")
        self.every_steps = every_steps
        self.half = "16" in precision
        self.last: dict[str, float] = {}
        self._counter: FlopsCounter | None = None
        self._begin()

    @property
    def flops_overall(self) -> float:
        """Model FLOPs of all of this session's steps, on all processes."""
        return self._flops_before + self._window["flops"] * world()

    @property
    def tokens_per_second_overall(self) -> float | None:
        """Tokens a second over all of this session's steps; None before the first."""
        tokens = self._tokens_before + self._window["tokens"] * world()
        return tokens / self.seconds_training if self.seconds_training else None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()
        assert isinstance(pl_module, DeepStackModule)
        self._counter = FlopsCounter(pl_module.network)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._counter is not None:
            self._counter.detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: MultimodalBatch, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        assert self._counter is not None
        window, self._steps = self._window, self._steps + 1
        window["tokens"] += sum(batch.lengths)
        window["supervised"] += len(batch.targets)
        window["samples"] += len(batch.keys)
        window["positions"] += batch.input_ids.numel()
        window["flops"] += self._counter.of(batch)
        full = self._steps >= self.every_steps
        if batch.input_ids.is_cuda and (full or trainer.global_step >= trainer.max_steps):
            torch.cuda.synchronize(batch.input_ids.device)  # so that the clock is read after the work is done
        seconds, waited = time.perf_counter() - self._start, self._newly_waited(trainer)
        window["seconds"] += seconds
        window["waited"] += waited
        self.seconds_training += seconds + waited
        if full:
            self._report(trainer, pl_module, batch.input_ids.device)

    def _begin(self) -> None:
        self.seconds_training = self._waited_before = self._start = 0.0
        self._tokens_before = self._flops_before = 0.0  # those of the windows that are over
        self._next_window()

    def _next_window(self) -> None:
        self._window = dict.fromkeys(_COUNTED, 0.0)
        self._steps = 0

    def _newly_waited(self, trainer: lightning.Trainer) -> float:
        loader = trainer.train_dataloader
        if not isinstance(loader, TimedLoader):
            return 0.0
        before, self._waited_before = self._waited_before, loader.waited
        return loader.waited - before

    def _report(self, trainer: lightning.Trainer, module: lightning.LightningModule, device: torch.device) -> None:
        every = from_all(self._window)
        sums = {name: sum(each[name] for each in every) for name in _COUNTED}
        total = max(each["seconds"] + each["waited"] for each in every)
        peak = peak_of(device, self.half)
        each = {
            "step_seconds": [one["seconds"] / self._steps for one in every],
            "data_wait_share": [one["waited"] / (one["seconds"] + one["waited"]) for one in every],
        }
        self.last = {
            "speed/tokens_per_second": sums["tokens"] / total,
            "speed/supervised_tokens_per_second": sums["supervised"] / total,
            "speed/samples_per_second": sums["samples"] / total,
            "speed/model_flops_per_second": sums["flops"] / total,
            "speed/padding_share": 1 - sums["tokens"] / sums["positions"],
            **({} if peak is None else {"speed/mfu": sums["flops"] / total / (peak * len(every))}),
            **{f"speed/{name}": sum(values) / len(values) for name, values in each.items()},
        }
        shown = {"tok/s": self.last["speed/tokens_per_second"], "pad": self.last["speed/padding_share"]}
        if isinstance(trainer.train_dataloader, TimedLoader):
            shown["wait"] = self.last["speed/data_wait_share"]
        else:
            del self.last["speed/data_wait_share"], each["data_wait_share"]
        if peak is not None:
            shown["mfu"] = self.last["speed/mfu"]
        if several():
            each["tokens_per_second"] = [one["tokens"] / (one["seconds"] + one["waited"]) for one in every]
            for name, of in (("min", min), ("max", max)):
                self.last |= {f"speed_{name}/{key}": of(values) for key, values in each.items()}
        for logger in trainer.loggers:  # not through the module: Lightning would drop what falls between its own steps
            logger.log_metrics(self.last, step=trainer.global_step)
        module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        self._tokens_before += sums["tokens"]
        self._flops_before += sums["flops"]
        self._next_window()
