"""How fast training goes, and how much of the time it waits for data.

Lightning's ThroughputMonitor does neither half of what is wanted here: it knows no waiting for data, counts whatever a
callback does between steps (generation, checkpoints) as training time, and warns where the module counts no FLOPs.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.processes import from_all, world


class TimedLoader:
    """A loader that counts the seconds its consumer waits.

    Its length is that of the whole run, what came before a resume included: so counts Lightning, which would begin the
    loader anew at the end of a shorter one.

    Attributes:
        waited: seconds spent in ``next``, since it was made.
    """

    def __init__(self, loader: Iterable[MultimodalBatch], length: int) -> None:
        self.loader = loader
        self.length = length
        self.waited = 0.0

    def __len__(self) -> int:
        return self.length

    def close(self) -> None:
        """Let go of the loader, whose workers end with it."""
        self.loader = ()

    def __iter__(self) -> Iterator[MultimodalBatch]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch


class Throughput(lightning.Callback):
    """Logs, over windows of ``every_steps`` batches: tokens (that are no padding) and samples a second of all
    processes; and of this one seconds a step, and the share of time spent waiting for data.

    Time is that of steps and of waiting; what callbacks do between steps does not count. On an accelerator waiting
    overlaps with computing, so that the share is an upper bound.

    Attributes:
        last: the newest window's values, by their logged names.
        seconds_training: time of all of this session's steps, waiting for data included; nothing else.
    """

    def __init__(self, every_steps: int = 10) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: a window holds at least one step.")
        self.every_steps = every_steps
        self.last: dict[str, float] = {}
        self._begin()

    @property
    def tokens_per_second_overall(self) -> float | None:
        """Tokens a second over all of this session's steps; None before the first."""
        tokens = self._tokens_before + (0 if self._tokens is None else int(self._tokens) * world())
        return tokens / self.seconds_training if self.seconds_training else None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

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
        tokens = batch.attention_mask.sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        self._samples += len(batch.keys)
        self._steps += 1
        full = self._steps >= self.every_steps
        if full or trainer.global_step >= trainer.max_steps:
            int(self._tokens)  # waits for the device, so that the clock is read after the work is done
        seconds, waited = time.perf_counter() - self._start, self._newly_waited(trainer)
        self._seconds += seconds
        self._waited += waited
        self.seconds_training += seconds + waited
        if full:
            self._report(trainer, pl_module, int(self._tokens))

    def _begin(self) -> None:
        self.seconds_training = self._waited_before = self._start = 0.0
        self._tokens_before = 0  # those of the windows that are over
        self._next_window()

    def _next_window(self) -> None:
        self._tokens: Tensor | None = None  # summed on the device: reading it every step would wait for the device
        self._samples = self._steps = 0
        self._seconds = self._waited = 0.0

    def _newly_waited(self, trainer: lightning.Trainer) -> float:
        loader = trainer.train_dataloader
        if not isinstance(loader, TimedLoader):
            return 0.0
        before, self._waited_before = self._waited_before, loader.waited
        return loader.waited - before

    def _report(self, trainer: lightning.Trainer, module: lightning.LightningModule, tokens: int) -> None:
        every = from_all((tokens, self._samples, self._seconds + self._waited))
        tokens, samples = sum(t for t, _, _ in every), sum(s for _, s, _ in every)
        total = max(seconds for _, _, seconds in every)
        self.last = {
            "speed/tokens_per_second": tokens / total,
            "speed/samples_per_second": samples / total,
            "speed/step_seconds": self._seconds / self._steps,
        }
        shown = {"tok/s": self.last["speed/tokens_per_second"]}
        if isinstance(trainer.train_dataloader, TimedLoader):
            self.last["speed/data_wait_share"] = shown["wait"] = self._waited / (self._seconds + self._waited)
        for logger in trainer.loggers:  # not through the module: Lightning would drop what falls between its own steps
            logger.log_metrics(self.last, step=trainer.global_step)
        module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        self._tokens_before += tokens
        self._next_window()
