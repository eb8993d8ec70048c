"""What test_spread runs in several processes: one fit after another, each spread in its own way, noted on disk.

python -m torch.distributed.run --nproc-per-node 2 spread_fits.py FOLDER '[{"name": "fsdp", "kind": "fsdp"}, ...]'
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import FROZEN, LLM, SCRATCH, STACKED, Pages, small_model, small_processor, small_trainer

from deepstack_pl import processes
from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.packing import in_one_row
from deepstack_pl.language.config import Attention
from deepstack_pl.multimodal.config import LoRAConfig
from deepstack_pl.stacking.config import Host, InjectionConfig, ModelConfig, Newline, Operator, Order, Sequence, Source
from deepstack_pl.training.compiling import compile_blocks
from deepstack_pl.training.config import Checkpointing, OptimConfig, PartConfig, Spread, StageConfig, StrategyConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.flops import FlopsCounter
from deepstack_pl.training.guard import FirstStepGuard
from deepstack_pl.training.interrupt import GracefulStop
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.parts import adapters_of
from deepstack_pl.training.sharding import checkpoint_activations, gathered, shard, shares_weights
from deepstack_pl.training.strategies import make_strategy

STEPS, BATCH, RATE = 3, 8, 0.5
STAGES = {
    "scratch": SCRATCH,
    "pretrain": StageConfig(name="pretrain", vision=FROZEN, llm=FROZEN),
    "finetune": StageConfig(name="finetune", vision=FROZEN),
    "lora": StageConfig(
        name="lora", vision=FROZEN, llm=PartConfig(lr=1e-3, lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.0))
    ),
}


INTO_THE_TOWER = [InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)]
PLANS = {
    "deepstack_l": STACKED,
    "deepstack_v": ModelConfig(name="deepstack_v", host=Host.vit, start_layer=0),
    "deepstack_lv": ModelConfig(name="deepstack_lv", start_layer=1, injections=INTO_THE_TOWER),
    "qwen3_style": ModelConfig(name="qwen3_style", tiles=0, source=Source.tap, taps=[1, 2, 3], groups=3, start_layer=1),
    "gated": ModelConfig(name="gated", start_layer=1, operator=Operator.gated_add),
    "deepstack_l_hd": ModelConfig(
        name="deepstack_l_hd",
        detail=2,
        sequence=Sequence.global_and_tiles,
        order=Order.raster,
        newline=Newline.rows_and_groups,
        source=Source.detail,
        start_layer=1,
    ),
}


class Mixed(Pages):
    """Every second page without its picture, so that a process may have none beside one that has."""

    def __getitem__(self, index: int) -> Record:
        page = super().__getitem__(index)
        if index % 2:
            return page
        turns = (Turn(Role.user, f"Which colours has page {index}?"), page.turns[1])
        return Record(key=page.key, turns=turns, images=(), kind=page.kind, facts=page.facts)


class ByGradient(DeepStackModule):
    """Plain SGD: what AdamW makes of rounding near zero is no measure of a gradient."""

    def configure_optimizers(self) -> Any:
        self.gradients: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.SGD([p for p in self.network.parameters() if p.requires_grad], lr=RATE)
        for group in optimizer.param_groups:
            group["part"] = "all"
        return optimizer

    def on_train_start(self) -> None:
        self._step.begin()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        self.gradients = {
            name: processes.unsharded(p.grad.detach()).clone().float()
            for name, p in self.network.named_parameters()
            if p.grad is not None
        }


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.images: list[list[bool]] = []  # of every forward, whether each process has one

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images.append(processes.from_all(bool((batch.token_index >= 0).any())))
        if not (batch_idx + 1) % trainer.accumulate_grad_batches:
            self.seen.append(float(trainer.callback_metrics["train/loss"]))


def one_fit(
    folder: Path,
    name: str,
    *,
    kind: str = "single",
    checkpointing: str = "none",
    precision: str = "32-true",
    stage: str = "scratch",
    micro: int = 1,
    replicas: int | None = None,
    tied: bool = False,
    plan: str = "deepstack_l",
    attention: str = "sdpa",
    compiled: bool = False,
) -> None:
    """Three steps; losses, gradients of the last and weights into ``folder/name.pt``."""
    llm = replace(LLM, attention=Attention[attention])
    config = StrategyConfig(name=kind, kind=Spread[kind], checkpointing=Checkpointing[checkpointing], replicas=replicas)
    lightning.seed_everything(0, verbose=False)
    world, first, chosen = processes.world(), processes.rank() == 0, STAGES[stage]
    device = "cpu" if first or not shares_weights(config) else "meta"
    module = ByGradient(
        lambda: small_model(PLANS[plan], llm, device, adapters_of(chosen), tied),
        chosen,
        OptimConfig(name="sgd", clip_norm=1.0),
        STEPS,
    )
    module.configure_model()
    checkpoint_activations(module.network, config.checkpointing)
    if compiled:
        compile_blocks(module.network, backend="aot_eager")
    if shares_weights(config):
        shard(module.network, config, precision, torch.device("cpu"))
    values = DataConfig(name="x", batch_size=BATCH, micro_batch_size=micro, workers=0)
    losses = Losses()
    trainer = small_trainer(
        folder,
        STEPS,
        callbacks=[FirstStepGuard(), GracefulStop(), losses],
        strategy=make_strategy(config, torch.device("cpu"), world),
        devices=world,
        plugins=[LightningEnvironment()],
        precision="32-true" if shares_weights(config) else precision,
        accumulate_grad_batches=values.accumulation(world),
        use_distributed_sampler=False,
    )
    processor = small_processor(PLANS[plan])
    collate = partial(in_one_row, processor.collate) if attention == "varlen" else processor.collate
    data = DeepStackDataModule(Mixed(24), Pages(4), processor, values, 0, STEPS, collate=collate)
    trainer.fit(module, datamodule=data)
    weights = gathered(module.network)
    if first:
        counter = FlopsCounter(module.network)  # of matrices of which a share lies here
        found = {
            "losses": losses.seen,
            "images": losses.images,
            "gradients": module.gradients,
            "weights": dict(weights),
        }
        found["flops"] = [times for times, _ in counter._layers] + [counter._head]
        torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes.join(60, torch.device("cpu"))
    for phase in json.loads(sys.argv[2]):
        one_fit(Path(sys.argv[1]), **phase)
    if processes.several():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as a run's processes end: Python's own taking apart aborts one now and then
