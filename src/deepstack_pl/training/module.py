"""The three verbs of training: build the model, take a step, set up the optimiser. Nothing else lives here."""

import zlib
from collections.abc import Callable
from math import ceil
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.processes import local, unsharded
from deepstack_pl.training.config import OptimConfig, StageConfig
from deepstack_pl.training.finite import FiniteGuard
from deepstack_pl.training.parts import PartsTable, apply_stage, optimizer_groups
from deepstack_pl.training.step_loss import StepLoss


class DeepStackModule(lightning.LightningModule):
    """Trains the model that ``build`` returns, as ``stage`` and ``optim`` say, for ``max_steps`` optimiser steps.

    Attributes:
        model: None until `configure_model` has run.
        parts: the trainable-parts table, from then on.
    """

    def __init__(
        self,
        build: Callable[[], DeepStackForConditionalGeneration],
        stage: StageConfig,
        optim: OptimConfig,
        max_steps: int,
    ) -> None:
        super().__init__()
        if max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={max_steps}: the learning rate's decay needs a last step. Give 1 or more."
            )
        if not 0 <= optim.warmup_ratio < 1:
            raise ValueError(
                f"optim.warmup_ratio={optim.warmup_ratio} is the share of steps that warm up: use 0 up to, not with, 1."
            )
        self.build = build
        self.stage = stage
        self.optim = optim
        self.max_steps = max_steps
        self.model: DeepStackForConditionalGeneration | None = None
        self.parts: PartsTable | None = None
        self.updating = False  # from the last look at the gradients until weights and AdamW's states agree again
        self._step = StepLoss()
        self._finite = FiniteGuard(optim)

    def configure_model(self) -> None:
        """Build and freeze, once: Lightning calls this for every fit, test and load."""
        if self.model is not None:
            return
        model = self.build()
        self.parts = apply_stage(model, self.stage)
        self.model = model.train()

    @property
    def skipped(self) -> list[tuple[int, list[str]]]:
        """Steps that were left out, with the keys of their samples."""
        return self._finite.skipped

    @property
    def network(self) -> DeepStackForConditionalGeneration:
        """The model, built."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches, of which a step may now have another number; what the optimiser has not
        stepped on is in no weight and will come again.
        """
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts |= dict.fromkeys(counts, done)

    def on_train_start(self) -> None:
        """Rates as this run's schedule says: a checkpoint brings those of the schedule that it was saved under, and
        the first step after a resume with another max_steps would still be made at them.
        """
        self._step.begin()  # of a fit before, broken off in the middle of a step
        (config,) = self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        assert isinstance(schedule, LambdaLR)
        rates = [b * at(schedule.last_epoch) for b, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        """The sum of this micro-batch's losses; the step's mean is made of it once all of them are known."""
        torch.manual_seed(self._dropout_seed(batch_idx))
        self._finite.add(batch.keys)
        losses = self.network(**batch.training_inputs(), use_cache=False).losses
        if self._logs_this_step:
            self._step.add_sources(losses.detach(), batch)
        return self._step.add(losses, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of the mean over the step's supervised tokens, before they are clipped; and what is logged."""
        loss, tokens = self._step.totals()
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size  # Lightning and DDP have divided by
        factor = shares / tokens.clamp_min(1)
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)
        mean = self._mean = loss / tokens.clamp_min(1)
        self.log("loss", mean, prog_bar=True, logger=False, batch_size=1)
        self.log_dict({"train/loss": mean, "train/supervised_tokens": tokens, **self._rates()}, batch_size=1)
        if self._logs_this_step:
            found = {f"train/loss/{source}": value for source, value in self._step.by_source().items()}
            for logger in self.trainer.loggers if found else ():  # not by log(): it repeats what a step does not hold
                logger.log_metrics(found, step=self.trainer.global_step)
        self._step.begin()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients of all processes; what is not finite goes no further.

        Raises:
            NotFinite: as ``optim.nonfinite`` says.
        """
        trained = [p for p in self.network.parameters() if p.grad is not None]
        norm = unsharded(get_total_norm([p.grad for p in trained if p.grad is not None]))
        self.log("train/gradient_norm", norm, batch_size=1)
        if self._logs_this_step:
            self.log_dict(self._norms(), batch_size=1)
        if self.trainer.scaler is None:  # fp16's loss scaler leaves such steps out by itself
            self._note(self._finite.look(self._mean, norm, trained, self.trainer.global_step))
        if gradient_clip_val:
            clip_grads_with_norm_(trained, gradient_clip_val, norm)
        self.updating = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; afterwards a checkpoint may be made."""
        super().optimizer_step(*args, **kwargs)
        self.updating = False

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW by part and weight decay; linear warm-up and cosine decay from each part's own peak."""
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.network, self.stage, self.optim.weight_decay),
            betas=(self.optim.betas[0], self.optim.betas[1]),
            eps=self.optim.eps,
            fused=self._fused,
        )
        warm_up = ceil(self.max_steps * self.optim.warmup_ratio)
        schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _note(self, left_out: list[str]) -> None:
        """Samples of a step that was left out, in this process's ledger."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in a connector
        if left_out and data is not None and data.ledger is not None:
            data.ledger.leave_out(left_out, self.trainer.global_step, self.trainer.global_rank)

    def _dropout_seed(self, batch_idx: int) -> int:
        """What dropout draws is a function of seed, step and process, as samples' order is: a resume repeats it."""
        trainer, seed = self.trainer, self.network.config.init_seed
        micro = batch_idx % trainer.accumulate_grad_batches
        return zlib.crc32(f"{seed}/dropout/{trainer.global_step}/{micro}/{trainer.global_rank}".encode())

    @property
    def _fused(self) -> bool:
        """On a GPU; not where a loss scaler would have it look at the gradients before they are clipped."""
        return self.trainer.scaler is None and all(p.is_cuda for p in self.network.parameters() if p.requires_grad)

    @property
    def _logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it in a connector
        return (self.trainer.global_step + 1) % every == 0

    def _norms(self) -> dict[str, Tensor]:
        """The norm of each part's gradients, before they are clipped."""
        grads = {name: [p.grad for _, p in named if p.grad is not None] for name, named in parts(self.network).items()}
        return {f"train/gradient_norm/{name}": unsharded(get_total_norm(each)) for name, each in grads.items() if each}

    def _rates(self) -> dict[str, float]:
        """The learning rate of each part in this step."""
        (optimizer,) = self.trainer.optimizers
        return {f"lr/{group['part']}": float(group["lr"]) for group in optimizer.param_groups}
