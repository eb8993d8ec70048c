"""Runs inside the tests' own process leave it as they found it."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a run then leaves the number of threads alone
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    yield
    lightning.setLevel(level)
