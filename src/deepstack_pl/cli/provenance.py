"""Where a number comes from: versions, commit, command line, digests of data order and initial weights."""

import hashlib
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.pipeline import PipelineSource
from deepstack_pl.data.sources import Source
from deepstack_pl.multimodal.build import parts
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.processes import several, world
from deepstack_pl.training.tally import Tally

_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "lightning": "lightning",
    "open_clip": "open_clip_torch",
    "pillow": "pillow",
    "simplejpeg": "simplejpeg",
    "webdataset": "webdataset",
    "deepstack_pl": "deepstack_pl",
}


def versions() -> dict[str, str]:
    """Of Python and of whatever computes."""
    return {"python": platform.python_version(), **{name: version(package) for name, package in _PACKAGES.items()}}


def digest_of(run: RunConfig) -> str:
    """Of all its values."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.structured(run)).encode()).hexdigest()[:16]


def without_passwords(command: str) -> str:
    """``command`` as it may be shown to others: https://user:PASSWORD@host without the password."""
    return re.sub(r"(://[^\s/@:]*):[^\s/@]*@", r"\1:...@", command)


def git() -> dict[str, Any]:
    """The commit that the package's source stands at, and whether it was changed since; empty outside a repository."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain"))} if commit else {}


@dataclass(frozen=True, slots=True)
class Memory:
    """The most bytes held at once since `begin`: an accelerator's count starts there, a process's is over its whole
    life, so that it is a run's own only where it rose during it (in a sweep, all arms are one process)."""

    before: int

    @classmethod
    def begin(cls) -> Self:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return cls(_process_peak())

    def peaks(self) -> dict[str, int]:
        """``process_peak``, left out where it is an earlier run's, and ``cuda_peak``."""
        now = _process_peak()
        found = {"process_peak": now} if now > self.before else {}
        if torch.cuda.is_available():
            found["cuda_peak"] = torch.cuda.max_memory_allocated()
        return found


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device) -> str:
    """What computed, and how many of them."""
    name = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{world()} x {name}" if several() else name


def data_of(train: Source | PipelineSource, val: Source, run: RunConfig) -> dict[str, Any]:
    """Which samples; ``order_digest`` and the counts of what was trained on are added once it was."""
    return {
        "name": run.data.name,
        "fingerprint": {"train": train.fingerprint, "val": val.fingerprint},
        "samples": {"train": None if isinstance(train, PipelineSource) else len(train), "val": len(val)},
        **counts(Tally()),
    }


def counts(tally: Tally) -> dict[str, Any]:
    """What was trained on, for the record; ``order_digest`` is empty before the first sample."""
    found = tally.to_dict()
    order = found.pop("order")
    return {"order_digest": f"{order:016x}" if tally.seen else "", "trained": found}


def weight_digests(model: DeepStackForConditionalGeneration) -> dict[str, dict[str, str]]:
    """For each part a digest of its weights, and one of its architecture (names and shapes)."""
    found: dict[str, dict[str, str]] = {"init_digest": {}, "architecture_digest": {}}
    for part, named in parts(model).items():
        weights, shapes = hashlib.sha256(), hashlib.sha256()
        for name, parameter in sorted(named):
            weights.update(name.encode())
            weights.update(_bytes(parameter))
            shapes.update(f"{name}:{tuple(parameter.shape)}".encode())
        found["init_digest"][part] = weights.hexdigest()[:16]
        found["architecture_digest"][part] = shapes.hexdigest()[:16]
    return found


def _bytes(parameter: nn.Parameter | Tensor) -> bytes:
    return parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
