"""How a run is evaluated. Loads without torch."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    name: str = "???"
    every_steps: int = 100  # validation by generation during training; 0: only at the end
    samples: int = 128  # samples of a validation during training
    final_samples: int = 512  # samples of the last one, which results.json reports
    batch_size: int = 64
    max_new_tokens: int = 48
    confidence: float = 0.95
