"""The first step, watched: gradients where training was promised, not one changed bit where freezing was."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.multimodal.build import parts
from deepstack_pl.processes import from_all, local
from deepstack_pl.training.module import DeepStackModule

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FirstStepGuard(lightning.Callback):
    """Stops a run whose stage is not what the optimiser does.

    Before the first optimiser step: no trainable parameter's gradient is None. Around the first step with a learning
    rate above zero: frozen parameters are bit-identical, and each trained part has changed. A step of text alone gives
    the vision path gradients of zero and proves only the LLM; the first one that holds an image is then looked at too.

    Attributes:
        done: all checks have passed; from then on the guard costs nothing.
    """

    def __init__(self) -> None:
        self.done = False
        self._gradients_seen = False
        self._before: dict[str, Tensor] = {}
        self._images = False  # whether any micro-batch of this step holds one
        self._text_passed = False  # a step of text alone was looked at

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: MultimodalBatch, batch_idx: int
    ) -> None:
        if not self.done:
            self._images |= bool((batch.token_index >= 0).any())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.done:
            return
        assert isinstance(pl_module, DeepStackModule)
        named = list(pl_module.network.named_parameters())
        self._images = any(from_all(self._images))
        if not self._gradients_seen:
            missing = [name for name, p in named if p.requires_grad and p.grad is None]
            if missing:
                raise RuntimeError(
                    f"{len(missing)} trainable parameters have no gradient after the first backward pass: "
                    f"{_some(missing)}. Freeze them in the stage, or connect them to the loss."
                )
            self._gradients_seen = True
        moves = any(group["lr"] > 0 for group in optimizer.param_groups)
        if moves and (self._images or not self._text_passed):
            self._before = digests(named)
        else:
            self._images = False  # nothing to look at: the next step's count anew

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.done or not self._before:
            return
        assert isinstance(pl_module, DeepStackModule)
        changed = self._changed(pl_module)
        images, self._before, self._images = self._images, {}, False
        skipped = [step for step, _ in pl_module.skipped[-1:]] == [trainer.global_step - 1]
        if not changed and (trainer.scaler is not None or skipped):
            return  # fp16's loss scaler or the guard of finite numbers left this step out: look at the next one
        by_part = parts(pl_module.network)
        frozen = [name for named in by_part.values() for name, p in named if not p.requires_grad and name in changed]
        if frozen:
            raise RuntimeError(
                f"{len(frozen)} frozen parameters changed in the first step with a learning rate above zero: "
                f"{_some(frozen)}. Something other than the optimiser's groups writes to them."
            )
        for part, named in by_part.items():
            trained = [name for name, p in named if p.requires_grad and (images or part == "llm")]
            if trained and not changed.intersection(trained):
                raise RuntimeError(
                    f"no parameter of the trained part {part!r} changed in the first step with a learning rate above "
                    f"zero{' and an image' if images else ''}: {_some(trained)}. Its "
                    "gradient or its learning rate is zero."
                )
        self.done, self._text_passed = images, True

    def _changed(self, module: DeepStackModule) -> set[str]:
        after = digests(module.network.named_parameters())
        equal = torch.stack([self._before[name] == value for name, value in after.items()]).tolist()
        here = {name for name, same in zip(after, equal, strict=True) if not same}
        return set().union(*from_all(here))  # a share of the weights may be one that no gradient reached


def digests(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """One integer for each parameter, on its device: the sum of the bit patterns of what lies here, so that any one
    changed bit shows.
    """
    found = {}
    for name, parameter in named:
        here = local(parameter.detach())
        found[name] = here.view(_INTEGERS[here.element_size()]).sum(dtype=torch.int64)
    return found


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
