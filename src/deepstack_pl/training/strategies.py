"""Lightning's strategies, with checkpoints in one form whether there is one process, copies or shares, so that a run
may go on with another number of processes.

What Lightning restores by itself (loops, callbacks, schedule, datamodule) stays Lightning's. Weights and AdamW's states
go through the store, by the names that the model gives them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from deepstack_pl.processes import rank, world
from deepstack_pl.training.checkpoints import all_of
from deepstack_pl.training.config import Spread, StrategyConfig
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.random_state import random_state
from deepstack_pl.training.restore import read_mine, read_plain, read_tensors
from deepstack_pl.training.store import Saver


class Stored(Strategy if TYPE_CHECKING else object):
    """What the three have in common.

    Attributes:
        saver: where checkpoints go.
        facts: of the run, for every manifest.
        random: the random numbers' state of this process in the checkpoint that was loaded; None where there is none.
    """

    saver: Saver | None = None
    facts: dict[str, Any] | None = None
    random: dict[str, Any] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # into weights and states that are in their place already

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # save_checkpoint asks for itself

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """`load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` has done it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint of its step into the store, whatever ``filepath`` is called; all processes must.

        Raises:
            SaveFailed: on all processes, if one could not.
        """
        assert self.saver is not None, "this strategy was given no store"
        tensors, groups = self._state()
        plain = {**checkpoint, "param_groups": groups}
        self.saver.start(checkpoint["global_step"], tensors, plain, random_state(), self.facts or {})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and AdamW's states into their places, from any number of processes; the rest is returned."""
        path = Path(checkpoint_path)
        (checkpoint,) = (there for there in all_of(path.parent) if there.folder.name == path.name)
        plain = read_plain(checkpoint)
        tensors, _ = self._state()
        read_tensors(checkpoint, tensors)
        network, optimizer = self._network(), self._optimizer()
        set_model_state_dict(network, tensors["model"])
        state = {"state": tensors["optimizer"], "param_groups": plain.pop("param_groups")}
        set_optimizer_state_dict(network, optimizer, state)
        same = checkpoint.manifest["world"] == world()
        self.random = read_mine(checkpoint, rank()) if same else None
        return plain

    def _state(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Weights and AdamW's states by name, as they lie here, and the optimiser's groups without them."""
        network = self._network()
        optimizer: dict[str, Any] = get_optimizer_state_dict(network, self._optimizer())
        return {"model": get_model_state_dict(network), "optimizer": optimizer["state"]}, optimizer["param_groups"]

    def _network(self) -> torch.nn.Module:
        module = self.lightning_module
        assert isinstance(module, DeepStackModule)
        return module.network

    def _optimizer(self) -> Optimizer:
        (optimizer,) = self.optimizers
        return optimizer


class OneDevice(Stored, SingleDeviceStrategy):
    """One process."""


class Copies(Stored, DDPStrategy):
    """Every process holds the model."""


class Shares(Stored, ModelParallelStrategy):
    """Every process holds a share of the weights; `sharding.shard` has made them."""


def make_strategy(config: StrategyConfig, device: torch.device, processes: int) -> OneDevice | Copies | Shares:
    """The strategy that ``config`` names, for ``processes`` of them; ``device`` is this one's."""
    if config.kind is Spread.single:
        return OneDevice(device)
    if config.kind is Spread.ddp:
        return Copies(gradient_as_bucket_view=True)
    return Shares(data_parallel_size=processes, tensor_parallel_size=1)
