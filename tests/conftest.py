"""What every test stands on: offline, few threads, and random streams that no test hands on to the next."""

import os
import random
import re
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import numpy as np
import pytest
import torch

# Small matrices run slower on more threads, which wait for each other; and sums then agree between machines.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_random_streams() -> Iterator[None]:
    """Every test starts from the same seeds, whatever ran before it, and leaves the streams as it found them."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)


_TESTS = Path(__file__).parent
_HOLDING = set(re.findall(r"`([\w/]+\.py::\w+)`", (_TESTS.parent / "docs" / "reliability.md").read_text()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What docs/reliability.md names is marked: ``pytest -m reliability`` runs what the page promises."""
    for item in items:
        if f"{item.path.relative_to(_TESTS)}::{getattr(item, 'originalname', item.name)}" in _HOLDING:
            item.add_marker(pytest.mark.reliability)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A promise whose test was skipped is not held."""
    report = yield
    if report.skipped and item.get_closest_marker("reliability"):
        report.outcome, report.longrepr = "failed", f"docs/reliability.md names it, so it must run: {report.longrepr}"
    return report
