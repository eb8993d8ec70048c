"""From values to a tower."""

from deepstack_pl.vision.config import QWEN3_VL, VisionConfig, VisionLibrary
from deepstack_pl.vision.towers_face import Tower
from deepstack_pl.vision.towers_huggingface import HuggingFaceTower
from deepstack_pl.vision.towers_open_clip import OpenClipTower
from deepstack_pl.vision.towers_qwen3_vl import Qwen3VLTower
from deepstack_pl.vision.towers_timm import TimmTower


def build_tower(config: VisionConfig) -> Tower:
    """The tower that ``config`` describes, randomly drawn; nothing is fetched.

    Raises:
        ValueError: the library has none of that description.
    """
    if config.library is VisionLibrary.timm or (config.library is VisionLibrary.open_clip and config.family):
        return TimmTower(config)
    if config.library is VisionLibrary.open_clip:
        return OpenClipTower(config)
    return Qwen3VLTower(config) if config.family == QWEN3_VL else HuggingFaceTower(config)
