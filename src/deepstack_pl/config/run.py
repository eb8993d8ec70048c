"""RunConfig: everything a run is. What outlives the process is typed; what dies with it may be a ``_target_``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deepstack_pl.data.config import DataConfig
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.language.config import LLMConfig
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.training.config import OptimConfig, StageConfig, StrategyConfig
from deepstack_pl.vision.config import VisionConfig


class DryRun(Enum):
    """How much of a run to try."""

    false = "false"  # all of it
    true = "true"  # compose, validate, print the plan and the parts: no data, no weights
    step = "step"  # one real step on the worst case, then stop


@dataclass(kw_only=True, slots=True)
class RunConfig:
    seed: int = 0
    dry_run: str = "false"  # a DryRun by name; YAML's true and false would not convert to an enum
    ckpt_path: str | None = None  # last, or a run's folder: go on there
    init_from: str | None = None  # a run's or an exported folder whose weights this run starts from
    model: ModelConfig = field(default_factory=ModelConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    compile: bool = False  # the blocks' forward passes in training: see training.compiling
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dry_run = self.dry_run.lower()
        if self.dry_run not in DryRun.__members__:
            raise ValueError(f"dry_run={self.dry_run}: use {', '.join(DryRun.__members__)}.")

    @property
    def trial(self) -> DryRun:
        """``dry_run``, typed."""
        return DryRun[self.dry_run]
