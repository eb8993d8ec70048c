"""The oracle and the tiny models are those of tests/multimodal, whole runs those of tests/cli."""

import sys
from pathlib import Path

for room in ("multimodal", "cli"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
