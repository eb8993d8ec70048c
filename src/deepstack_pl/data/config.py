"""Which samples, from where, in what batches. Loads without torch."""

from dataclasses import dataclass, field
from enum import Enum


class Source(Enum):
    """Where samples come from."""

    fine_print = "fine_print"  # the synthetic set, written to shards once
    shards = "shards"  # WebDataset tars: image and json in LLaVA's conversation format
    llava_json = "llava_json"  # one LLaVA-format JSON file and a folder of images


@dataclass(kw_only=True, slots=True)
class FinePrintConfig:
    """The synthetic set's difficulty and size; every value is part of the data's name on disk."""

    train_pages: int = 4096
    val_pages: int = 256
    seed: int = 0
    view_size: int = 32  # side of a view in pixels: what the global view shows the page at
    cells: int = 4  # cells a side; a page holds cells**2 coarse and cells**2 fine facts
    weaves: int = 4  # fine classes in use
    contrast: float = 69.0  # how far the page's deepest thread is from its swatch's colour, 8-bit levels
    flips: float = 0.0  # share of swatches with light and dark threads swapped; at 0.5 no linear reader sees a weave
    noise: float = 2.0  # paper grain, standard deviation in 8-bit levels

    def __post_init__(self) -> None:
        at = "data.fine_print"
        for name, pages in (("train_pages", self.train_pages), ("val_pages", self.val_pages)):
            if pages < 1:
                raise ValueError(f"{at}.{name}={pages}: a set has at least one page of each split.")
        if self.seed < 0:
            raise ValueError(f"{at}.seed={self.seed}: seeds count from 0.")
        if self.cells < 1 or self.view_size % self.cells or self.view_size // self.cells < 4:
            raise ValueError(
                f"{at}.cells={self.cells} does not divide {at}.view_size={self.view_size} into cells of 4 pixels or "
                "more: swatches must lie on the view's pixels. Choose a divisor of view_size that leaves 4 a cell."
            )
        if not 2 <= self.weaves <= 4:
            raise ValueError(f"{at}.weaves={self.weaves}: use 2 to 4 (plain, rows, columns, check).")
        if not 0 < self.contrast <= 69:
            raise ValueError(
                f"{at}.contrast={self.contrast}: use more than 0 and at most 69 levels; deeper threads would be "
                "clipped on the page, and clipped threads show in the global view."
            )
        if not 0 <= self.flips <= 0.5:
            raise ValueError(f"{at}.flips={self.flips}: a share from 0 to 0.5; above, it is the other polarity's.")
        if not 1 <= self.noise <= 8:
            raise ValueError(
                f"{at}.noise={self.noise}: use 1 to 8 levels; less grain does not hide how 8-bit rounding tells one "
                "weave from another in the global view, more is clipped."
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    name: str = "???"
    source: Source = Source.fine_print
    root: str = "data"  # folder of what is built or downloaded; shards: the folder with train/ and val/
    path: str | None = None  # llava_json: the JSON file
    images: str | None = None  # llava_json: the folder that the records' image paths start from
    val_samples: int = 256  # llava_json: about so many records held out for validation, drawn by seed; no image in both
    batch_size: int = 64
    workers: int = 1
    fine_print: FinePrintConfig = field(default_factory=FinePrintConfig)
