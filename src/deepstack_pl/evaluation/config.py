"""How a run is evaluated. Loads without torch."""

from dataclasses import dataclass, field

FOLDER = "evaluation"  # in a run's folder: a folder for each benchmark
HELD_OUT = "held_out"  # a run's own samples, among the folders of benchmarks
WITHOUT = "-no_injections"  # ends the name of what was answered with nothing stacked


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One benchmark over local copies of its published files (docs/benchmarks.md has their layout)."""

    task: str = "???"  # what reads and scores it: a name of evaluation.tasks
    root: str = "???"  # the folder that holds its files
    questions: list[str] = field(default_factory=list)  # in root
    annotations: list[str] = field(default_factory=list)  # in root: answers, where questions are published without
    images: str = "images"  # the folder of its pictures, in root
    prompt: str = "{question}"  # what is asked, below the picture
    ocr: bool = False  # the tokens that an OCR read off the picture, in the prompt (TextVQA)
    max_new_tokens: int = 16
    samples: int | None = None  # the first so many; null: all


@dataclass(kw_only=True, slots=True)
class TasksConfig:
    """Which benchmarks, and how they are asked."""

    batch_size: int = 64
    confidence: float = 0.95
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # by the name that results have


@dataclass(kw_only=True, slots=True)
class EvaluationConfig(TasksConfig):
    """The evaluation of a run that trains: of its own validation samples, and of benchmarks."""

    name: str = ""
    every_steps: int = 100  # validation by generation during training; 0: only at the end
    samples: int = 128  # samples of a validation during training, of each benchmark too
    final_samples: int = 512  # its own samples in the last one, which results.json reports; benchmarks are asked whole
    max_new_tokens: int = 48
