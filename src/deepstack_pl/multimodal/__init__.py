"""The model: projector, merge, DeepStackForConditionalGeneration and its processor."""
