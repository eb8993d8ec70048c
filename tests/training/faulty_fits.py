"""What test_faults runs in several processes: fits to which something happens, one after another, noted on disk.

python -m torch.distributed.run --nproc-per-node 2 faulty_fits.py FOLDER '[{"name": "a", "fault": "term", ...}, ...]'
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import SCRATCH, Pages, newest, small_model, small_processor, small_trainer

from deepstack_pl import processes
from deepstack_pl.data.config import DataConfig
from deepstack_pl.training import store
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.config import NonFinite, OptimConfig, Spread, StrategyConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.interrupt import GracefulStop
from deepstack_pl.training.ledger import Ledger
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.sharding import gathered, shard, shares_weights
from deepstack_pl.training.strategies import make_strategy

STEPS, BATCH = 6, 4


class Fault(Callback):
    """Something that happens at the start of step ``at``, on process ``where`` or, with -1, on all."""

    def __init__(self, what: str, at: int, where: int) -> None:
        self.what, self.at, self.where, self.done = what, at, where, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        here = self.where in (-1, processes.rank())
        if self.done or trainer.global_step != self.at or not here:
            return
        self.done = True
        if self.what == "term":  # this process's comes up to 90 ms after the others'
            delay = 0.09 * processes.rank() * ((self.at * 7) % 5) / 4
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        elif self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "hang":
            time.sleep(600)
        elif self.what == "raise":
            raise RuntimeError("as arranged")
        elif self.what == "nan":
            forward = pl_module.network.forward

            def poisoned(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                output.losses = output.losses * float("nan")
                pl_module.network.forward = forward
                return output

            pl_module.network.forward = poisoned
        elif self.what == "apart":  # it believes to be elsewhere
            next(c for c in trainer.callbacks if isinstance(c, GracefulStop))._batches += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.what == "term":
            time.sleep(0.05)  # so that the signals come in different steps


class KilledSaving(Callback):
    """kill -9 of process ``where`` in the middle of writing the tensors of its second checkpoint."""

    def __init__(self, where: int) -> None:
        save, calls = store.dcp.save, []

        def killed(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2 and processes.rank() == where:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(*args, **kwargs)

        store.dcp.save = killed


class Noted(Callback):
    """Keys and losses, step by step."""

    def __init__(self) -> None:
        self.keys: list[list[str]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keys.append(batch.keys)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def one_fit(
    folder: Path,
    name: str,
    *,
    kind: str = "ddp",
    fault: str | None = None,
    at: int = 3,
    where: int = -1,
    until: int = STEPS,
    every: int = 100,
    resume: str | None = None,
    nonfinite: str = "stop",
    dropout: float = 0.0,
    asynchronous: bool = True,
) -> None:
    """Train to step ``until``, with its fault; what came of it into ``folder/name/rank-N.json``."""
    config = StrategyConfig(name=kind, kind=Spread[kind])
    lightning.seed_everything(1 if resume else 0, verbose=False)
    world, first = processes.world(), processes.rank() == 0
    device = "cpu" if first or not shares_weights(config) else "meta"

    def build() -> Any:
        model = small_model(device=device)
        for layer in model.language_model.get_decoder().layers:
            layer.self_attn.attention_dropout = dropout
        return model

    module = DeepStackModule(build, SCRATCH, OptimConfig(name="adamw", nonfinite=NonFinite[nonfinite]), STEPS)
    module.configure_model()
    if shares_weights(config):
        shard(module.network, config, "32-true", torch.device("cpu"))
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    values = DataConfig(name="x", batch_size=BATCH, workers=0)
    data = DeepStackDataModule(Pages(9), Pages(4), small_processor(), values, 0, STEPS, ledger=Ledger(here))
    noted, stop = Noted(), GracefulStop()
    callbacks: list[Callback] = [noted, stop, RunCheckpoint(here, every_steps=every, asynchronous=asynchronous)]
    if fault == "killed saving":
        callbacks.append(KilledSaving(where))
    elif fault:
        callbacks.insert(0, Fault(fault, at, where))
    trainer = small_trainer(
        here,
        until,
        callbacks=callbacks,
        enable_checkpointing=True,
        strategy=make_strategy(config, torch.device("cpu"), world),
        devices=world,
        plugins=[LightningEnvironment()],
        accumulate_grad_batches=values.accumulation(world),
        use_distributed_sampler=False,
    )
    error = None
    try:
        checkpoint = str(newest(folder / resume)) if resume else None
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (ValueError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    found = {
        "error": error,
        "step": trainer.global_step,
        "preempted": stop.preempted,
        "keys": noted.keys,
        "losses": noted.losses,
        "skipped": module.skipped,
        "order": data.tally_here().order,
    }
    (here / f"rank-{processes.rank()}.json").write_text(json.dumps(found))
    if fault not in ("die", "raise", "hang") and not error:
        weights = gathered(module.network)
        if first:
            torch.save(dict(weights), here / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes.join(float(os.environ.get("PATIENCE", "60")), torch.device("cpu"))
    for phase in json.loads(sys.argv[2]):
        one_fit(Path(sys.argv[1]), **phase)
    if processes.several():
        torch.distributed.destroy_process_group()
