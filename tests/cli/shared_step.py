"""What torchrun runs for test_memory_shares: a step of two processes that share the weights, and what it holds.

torchrun --nproc-per-node 2 shared_step.py FILE '[["stage=finetune", "strategy.checkpointing=full"], ...]'
"""

import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import run_of

from deepstack_pl.cli import memory
from deepstack_pl.cli.assemble import model_builder
from deepstack_pl.processes import local
from deepstack_pl.training.memory import predict
from deepstack_pl.training.parts import apply_stage
from deepstack_pl.training.sharding import checkpoint_activations, replicas_of, shard, shares_weights

SHORT = ("llm.max_length=96", "data.batch_size=4", "data.micro_batch_size=2", "trainer.devices=2")
WIDE = ("llm.architecture.hidden_size=256", "llm.architecture.intermediate_size=512")


class Alive(TorchDispatchMode):
    """The most bytes of storages that any operator leaves behind; FSDP2 grows and shrinks them in place."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._see(tensor)
        self.before = self.most = self._bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.most = max(self.most, self._bytes())
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        self._storages.setdefault(id(storage), weakref.ref(storage, partial(self._gone, id(storage))))

    def _gone(self, key: int, _: Any) -> None:
        del self._storages[key]

    def _bytes(self) -> int:
        alive = [ref() for ref in self._storages.values()]
        return sum(storage.nbytes() for storage in alive if storage is not None)


def one_step(words: list[str]) -> dict[str, Any]:
    run = run_of(*SHORT, *WIDE, *words)
    precision = run.trainer["precision"]

    def built(device: str) -> Any:
        model = model_builder(run, image_token_id=0)(device=device)
        apply_stage(model, run.stage)
        return model.train()

    batch = memory.longest_batch(run)
    shares_of = 2 // replicas_of(run.strategy, 2)
    found = predict(built("meta"), batch, precision, gpu=False, strategy=run.strategy, shares=shares_of)
    model, inputs = built("cpu"), batch.training_inputs()
    checkpoint_activations(model, run.strategy.checkpointing)
    run_by: Any = model
    if shares_weights(run.strategy):
        shard(model, run.strategy, precision, torch.device("cpu"))
    else:
        run_by = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):  # what is made once; and gradients to add to
        run_by(**inputs, use_cache=False).losses.sum().backward()
    shares = [local(p) for p in model.parameters()]
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    buckets = {grad.untyped_storage().data_ptr(): grad.untyped_storage() for grad in grads}
    given = [each for each in inputs.values() if isinstance(each, torch.Tensor)]
    alive = Alive(*shares, *grads, *model.buffers(), *given)
    with alive:
        loss = run_by(**inputs, use_cache=False).losses.sum()
        loss.backward()
    return {
        "words": words,
        "real": {
            "weights": sum(share.nbytes for share in shares),
            "gradients": sum(storage.nbytes() for storage in buckets.values()),
            "most": alive.most - alive.before,
        },
        "predicted": {
            "weights": sum(found.weights.values()),
            "gradients": sum(found.gradients.values()),
            "most": sum(found.peak.values()) + found.gathered,
        },
        "gathered": found.gathered,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    done = [one_step(words) for words in json.loads(sys.argv[2])]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(done))
    dist.destroy_process_group()
