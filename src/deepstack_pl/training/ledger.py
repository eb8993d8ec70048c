"""The ledger: a line for every sample that was not trained on as it stands in the data."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepstack_pl.batch import MultimodalBatch


class Ledger:
    """``ledger.jsonl`` in a run's folder, and ``ledger-1.jsonl``, ... of further processes.

    A line is ``{"step", "key", "source", "what": "refused" or "cut", ...}``, with the reason and the sentence of a
    refusal, or the positions that were cut; or it names a sample of a step that was left out as not finite. It is
    written when the batch comes to be trained on; what was read ahead and never trained on leaves none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, batch: MultimodalBatch, step: int, rank: int) -> None:
        """The lines of one micro-batch of optimiser step ``step``, if it has any."""
        lines = []
        for key, source, cut, refused in zip(batch.keys, batch.sources, batch.cuts, batch.refused, strict=True):
            place = {"step": step, "key": key, "source": source}
            if refused is not None:
                reason, sentence = refused
                lines.append({**place, "what": "refused", "reason": reason.value, "sentence": sentence})
            elif cut:
                lines.append({**place, "what": "cut", "positions": cut})
        self._append(lines, rank)

    def leave_out(self, keys: Sequence[str], step: int, rank: int) -> None:
        """The samples of this process in step ``step``, which changed no weight."""
        self._append([{"step": step, "key": key, "what": "left out, not finite"} for key in keys], rank)

    def go_back(self, step: int) -> None:
        """Take away the lines of ``step`` and later, and what a kill cut off: a run that goes on from there will write
        them again.
        """
        for file in sorted(self.folder.glob("ledger*.jsonl")):
            text = file.read_text(encoding="utf-8")
            kept = [line for line in text.splitlines() if _step(line) < step]
            if text != "".join(f"{line}\n" for line in kept):
                partial = file.with_name(f".{file.name}.partial")
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                partial.replace(file)

    def _append(self, lines: Sequence[dict[str, Any]], rank: int) -> None:
        if lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file(rank).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)

    def file(self, rank: int) -> Path:
        return self.folder / ("ledger.jsonl" if rank == 0 else f"ledger-{rank}.jsonl")


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # cut off by a kill, in the middle of its step
