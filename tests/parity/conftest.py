"""The oracle and the tiny models are those of tests/multimodal, whole runs those of tests/cli."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for room in ("multimodal", "cli"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models of this size wait for a second thread longer than they compute, minutes in all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
