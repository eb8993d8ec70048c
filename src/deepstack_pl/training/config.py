"""Stages, optimisers and how a run is spread over processes, as values. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum

from deepstack_pl.multimodal.config import LoRAConfig


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """One part of the model during a stage."""

    trained: bool = True
    lr: float = 1e-3  # peak learning rate; ignored (and said so) where the part is frozen
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # of rank 1 or more: adapters learn, the part's weights do not


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Which parts learn, and how fast: scratch, pretrain (projector only), finetune."""

    name: str = "???"
    vision: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    llm: PartConfig = field(default_factory=PartConfig)


class NonFinite(Enum):
    """What a step does whose loss or gradients are infinite or no numbers, on any process; it updates nothing."""

    stop = "stop"  # end the run, and name the samples
    skip = "skip"  # go on with the next, and write the samples down


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with a linear warm-up and cosine decay (LLaVA-1.5's recipe)."""

    name: str = "???"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0
    nonfinite: NonFinite = NonFinite.stop
    max_skipped: int = 10  # nonfinite=skip: steps of one start that may be left out; one more stops the run

    def __post_init__(self) -> None:
        if self.max_skipped < 0:
            raise ValueError(f"optim.max_skipped={self.max_skipped}: steps, 0 or more.")


PREEMPTED = 143  # exit status of a run whose machine was wanted for something else: 128 + SIGTERM, as shells say it


class Spread(Enum):
    """How a run is spread over processes, each with a device of its own; ``trainer.devices`` says how many."""

    single = "single"  # one process
    ddp = "ddp"  # every process holds the whole model
    fsdp = "fsdp"  # every process holds a share of the weights, gradients and optimiser states
    fsdp_hybrid = "fsdp_hybrid"  # shares within a group of processes, one group beside another with the same


class Checkpointing(Enum):
    """Which activations of the LLM's layers and the tower's blocks are computed again in the backward pass."""

    none = "none"
    selective = "selective"  # all but the results of matrix products and of attention
    full = "full"  # all but each block's input


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """What is put on the model from outside: sharding, activation checkpointing, and how long processes wait."""

    name: str = "???"
    kind: Spread = Spread.single
    checkpointing: Checkpointing = Checkpointing.none
    replicas: int | None = None  # fsdp_hybrid: groups that each hold the model once; default: one a machine
    start_timeout: float = 1800.0  # seconds that a process waits for another while weights load and kernels compile
    timeout: float = 300.0  # and once a few steps are made
    stall: float = 200.0  # seconds in one batch, four times as many between two, until a process says where it stands

    def __post_init__(self) -> None:
        if self.replicas is not None and (self.kind is not Spread.fsdp_hybrid or self.replicas < 1):
            raise ValueError(
                f"strategy.replicas={self.replicas} with strategy.kind={self.kind.name}: replicas are the groups of "
                "strategy=fsdp_hybrid, 1 or more. Leave it out, or say strategy=fsdp_hybrid."
            )
        for name, value in (
            ("start_timeout", self.start_timeout),
            ("timeout", self.timeout),
            ("stall", self.stall),
        ):
            if value <= 0:
                raise ValueError(f"strategy.{name}={value}: seconds, more than 0.")
