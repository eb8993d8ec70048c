"""The ledger: a line for every sample that was not trained on as it stands in the data, and what they come to."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.training.datamodule import DeepStackDataModule


class Ledger:
    """``ledger.jsonl`` in a run's folder, and ``ledger-1.jsonl``, ... of further processes.

    A line is ``{"step", "key", "source", "what": "refused" or "cut", ...}``, with the reason and the sentence of a
    refusal, or the positions that were cut. It is written when the batch comes to be trained on; what was read ahead
    and never trained on leaves none.
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
        if lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file(rank).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)

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

    def file(self, rank: int) -> Path:
        return self.folder / ("ledger.jsonl" if rank == 0 else f"ledger-{rank}.jsonl")


class DataCounts(lightning.Callback):
    """Logs what was trained on so far, of all processes: samples by source, refused by reason, cut."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        # Lightning sets these in its connectors.
        every, data = trainer.log_every_n_steps, trainer.datamodule  # type: ignore[attr-defined]
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % every:
            return
        assert isinstance(data, DeepStackDataModule)
        tally = data.tally()
        values = {"data/samples": tally.samples, "data/refused": tally.refused.total()}
        values |= {"data/cut_samples": tally.cut_samples, "data/cut_positions": tally.cut_positions}
        values |= {f"data/refused/{reason}": count for reason, count in tally.refused.items()}
        if len(tally.sources) > 1:
            values |= {f"data/samples/{source}": count for source, count in tally.sources.items()}
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # cut off by a kill, in the middle of its step
