"""What torchrun runs for test_several_processes: one fit after another in one group of processes, noted on disk.

torchrun --nproc-per-node 2 several_processes.py FOLDER '[{"name": "whole", "until": 7}, ...]'
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import Pages, newest, small_module, small_processor, small_trainer

from deepstack_pl.batch import Reason, Record, Refused
from deepstack_pl.data.config import Batching, DataConfig, Remainder, Shuffle
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.config import Spread, StrategyConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.ledger import Ledger
from deepstack_pl.training.strategies import make_strategy

STEPS, PAGES, BATCH = 7, 18, 8  # three steps an epoch, the last of 2 samples and 6 rows that fill it


class Clustered(Pages):
    """Every refused sample of the first batch's second half: all of one process of two."""

    bad: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Record:
        page = super().__getitem__(index)
        if page.key in self.bad:
            raise Refused(Reason.image, f"{page.key}: cannot be read.")
        return page


class Noted(Callback):
    """The keys of every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch.keys)


def one_fit(
    folder: Path,
    name: str,
    *,
    until: int = STEPS,
    resume: str | None = None,
    micro: int | None = None,
    workers: int = 0,
    bad: tuple[str, ...] = (),
    max_refused: float = 0.0,
    **config: str,
) -> None:
    """Train to step ``until``, from the checkpoint of the fit ``resume``; notes into ``folder/name``."""
    enums = {"batching": Batching, "shuffle": Shuffle, "remainder": Remainder}
    chosen: dict[str, Any] = {key: enums[key][value] for key, value in config.items()}
    values = DataConfig(
        name="x", batch_size=BATCH, micro_batch_size=micro, workers=workers, max_refused=max_refused, **chosen
    )
    pages = Clustered(PAGES)
    pages.bad = tuple(bad)
    lightning.seed_everything(0, verbose=False)
    data = DeepStackDataModule(pages, Pages(4), small_processor(), values, 0, STEPS, ledger=Ledger(folder / name))
    notes, world = Noted(), int(_environment("WORLD_SIZE", "1"))
    spread = StrategyConfig(name="x", kind=Spread.ddp if world > 1 else Spread.single)
    (folder / name).mkdir(parents=True, exist_ok=True)
    trainer = small_trainer(
        folder / name,
        until,
        callbacks=[notes, RunCheckpoint(folder / name)],
        enable_checkpointing=True,
        accumulate_grad_batches=values.accumulation(world),
        use_distributed_sampler=False,
        devices=world,
        strategy=make_strategy(spread, torch.device("cpu"), world),
    )
    error = None
    try:
        ckpt = str(newest(folder / resume)) if resume else None
        trainer.fit(small_module(steps=STEPS), datamodule=data, ckpt_path=ckpt, weights_only=True)
    except ValueError as refusal:
        error = str(refusal)
    found = {"keys": notes.seen, "error": error, "tally": data.tally().to_dict(), "world": world}
    (folder / name / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


def _environment(name: str, default: str) -> str:
    import os

    return os.environ.get(name, default)


if __name__ == "__main__":
    for phase in json.loads(sys.argv[2]):
        one_fit(Path(sys.argv[1]), **phase)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as a run's processes end: Python's own taking apart aborts one now and then
