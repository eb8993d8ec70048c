"""The three verbs of training: build the model, take a step, set up the optimiser. Nothing else lives here."""

from collections.abc import Callable
from math import ceil
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.config import OptimConfig, StageConfig
from deepstack_pl.training.parts import PartsTable, apply_stage, optimizer_groups


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

    def configure_model(self) -> None:
        """Build and freeze, once: Lightning calls this for every fit, test and load."""
        if self.model is not None:
            return
        model = self.build()
        self.parts = apply_stage(model, self.stage)
        self.model = model.train()

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
        (config,) = self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        assert isinstance(schedule, LambdaLR)
        rates = [b * at(schedule.last_epoch) for b, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        output = self.network(**batch.model_inputs(), use_cache=False)
        loss, samples = output.loss, len(batch.keys)
        if bool((batch.labels[:, 1:] == IGNORE_INDEX).all()):
            loss = output.logits.sum() * 0.0  # rows that only fill it: the mean over no token is NaN
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=samples)
        supervised = (batch.labels[:, 1:] != IGNORE_INDEX).sum()
        values = {"train/loss": loss.detach(), "train/supervised_tokens": supervised.float(), **self._rates()}
        if len(set(batch.sources)) > 1 and self._logs_this_step:
            values |= losses_by_source(output.logits.detach(), batch)
        self.log_dict(values, batch_size=samples)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW by part and weight decay; linear warm-up and cosine decay from each part's own peak."""
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.network, self.stage, self.optim.weight_decay),
            betas=(self.optim.betas[0], self.optim.betas[1]),
            eps=self.optim.eps,
        )
        warm_up = ceil(self.max_steps * self.optim.warmup_ratio)
        schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it in a connector
        return (self.trainer.global_step + 1) % every == 0

    def _rates(self) -> dict[str, float]:
        """The learning rate of each part in this step."""
        (optimizer,) = self.trainer.optimizers
        return {f"lr/{group['part']}": float(group["lr"]) for group in optimizer.param_groups}


def losses_by_source(logits: Float[Tensor, "b t v"], batch: MultimodalBatch) -> dict[str, Tensor]:
    """``train/loss/SOURCE``: the mean over the supervised tokens of each source in this batch."""
    found, owners, labels = {}, batch.sample_ids()[:, 1:], batch.labels[:, 1:]
    for source in sorted({name for name in batch.sources if name}):
        its = torch.tensor([place for place, name in enumerate(batch.sources) if name == source], device=labels.device)
        learned = torch.isin(owners, its) & (labels != IGNORE_INDEX)
        if bool(learned.any()):
            found[f"train/loss/{source}"] = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned])
    return found
