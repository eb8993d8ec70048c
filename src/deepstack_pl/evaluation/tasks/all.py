"""All benchmarks by name."""

from deepstack_pl.evaluation.task import Task

TASKS: dict[str, Task] = {}


def find(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise ValueError(f"{name}: no such task. There are {', '.join(TASKS)}.")
    return TASKS[name]
