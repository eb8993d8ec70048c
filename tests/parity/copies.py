"""Copies of golden cases, to be spoiled in one place; and what a result complains of."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from deepstack_pl.inspection.parity import CaseResult

GOLDEN = Path(__file__).parents[1] / "golden"


def complaints(result: CaseResult) -> str:
    return "; ".join([result.error, *(f"{row.name}: {row.reason}" for row in result.rows if not row.ok), versions()])


def versions() -> str:
    """Of what ids, views and logits may change with."""
    return ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "tokenizers", "pillow")
    )


def failed(result: CaseResult) -> list[str]:
    assert not result.error, result.error
    return [row.name for row in result.rows if not row.ok]


def copy_of(tmp_path: Path, case: str) -> Path:
    """A folder with one golden case; the case's own folder is in ``cases``."""
    checkpoint = json.loads((GOLDEN / "cases" / case / "meta.json").read_text())["checkpoint"]
    for part in (f"cases/{case}", checkpoint, "vision_tower"):
        shutil.copytree(GOLDEN / part, tmp_path / part)
    return tmp_path


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def spoil(file: Path, key: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(file)
    tensors[key] = change(tensors[key].clone()).contiguous()
    save_file(tensors, file)


def with_value(value: float, *at: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


def with_more(amount: float, *at: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] += amount
        return tensor

    return change
