"""What a run finds around it: cores to share, libraries that talk, and somebody who watches, or nobody."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from deepstack_pl.config.run import RunConfig

_KNOWN = (  # Lightning's advice that does not apply here
    ".*does not have many workers.*",
    ".*`val_dataloader`.*",
    ".*isinstance.*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*torch.distributed is disabled.*",
    "FSDP2-wrapped module .* returned a view tensor.*",  # nothing here works in place on what a module returns
)


def share_cores(run: RunConfig) -> None:
    """Leave the data workers a core each: threads that wait for one another on too few cores spin most of the time."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - run.data.workers))


def cores() -> int:
    """Cores that this process may use: a container or a batch system often lends fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def be_quiet() -> None:
    """What libraries tell everybody is not what this run's reader needs."""
    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in _KNOWN:
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def bar_on(console: Console) -> Iterator[Progress | None]:
    """A bar where somebody watches."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield progress
