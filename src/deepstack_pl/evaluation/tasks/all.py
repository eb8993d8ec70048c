"""All benchmarks, by name."""

from difflib import get_close_matches

from deepstack_pl.evaluation.task import Task
from deepstack_pl.evaluation.tasks import chartqa, docvqa, gqa, infovqa, pope, seed, textvqa, vqav2

_MODULES = (textvqa, chartqa, docvqa, infovqa, vqav2, gqa, pope, seed)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def find(name: str) -> Task:
    """The benchmark called ``name``.

    Raises:
        ValueError: there is none; names the near miss, and all.
    """
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"task {name!r} is no benchmark.{hint} There are {', '.join(TASKS)}.")
