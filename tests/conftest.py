"""What every test stands on: offline, few threads, and random streams that no test hands on to the next."""

import os
import random
from collections.abc import Iterator

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
