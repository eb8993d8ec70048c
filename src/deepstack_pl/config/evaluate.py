"""EvaluateConfig: everything that ``python evaluate.py`` is told."""

from dataclasses import dataclass, field
from enum import Enum

from deepstack_pl.evaluation.config import TasksConfig
from deepstack_pl.language.config import Attention


class Precision(Enum):
    """What weights are held in and computed with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"  # as the published evaluation


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    ckpt: str = "???"  # a finished run's or an exported folder; outputs/latest names the newest run
    to: str | None = None  # where answers and results go; null: evaluation/ in the folder of ckpt
    fresh: bool = False  # answer anew what is answered already; what is there is renamed
    injections: bool = True  # false: the same weights without anything stacked; results go beside the others
    device: str = "auto"  # cpu, cuda or auto
    dtype: Precision | None = None  # null: as the weights are saved
    attention: Attention | None = None  # null: what transformers takes
    evaluation: TasksConfig = field(default_factory=TasksConfig)


def check(config: EvaluateConfig) -> None:
    """Refuse values that nothing can mean.

    Raises:
        ValueError: naming the value, the rule and the remedy.
    """
    asked = config.evaluation
    if asked.batch_size < 1:
        raise ValueError(f"evaluation.batch_size={asked.batch_size}: a batch holds 1 sample or more.")
    if not 0 < asked.confidence < 1:
        raise ValueError(f"evaluation.confidence={asked.confidence}: use a share between 0 and 1, such as 0.95.")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device}: use auto, cpu or cuda; one process takes one GPU, its own.")
