"""Import this, and plain transformers loads a run's folder: AutoConfig, AutoModelForImageTextToText, AutoProcessor.

Each class is registered where it is defined; this imports them. The room itself cannot: its values load without torch.
"""

from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor

__all__ = ["DeepStackConfig", "DeepStackForConditionalGeneration", "DeepStackProcessor"]
