"""Batches for Lightning, and where to go on: a few plain numbers in the checkpoint, the same on every process.

The position is the datamodule's and not the loader's: Lightning restores a loader's state only in the middle of an
epoch, and gives rank 0's to every rank.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning
import numpy as np
from jaxtyping import Int
from numpy import ndarray

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.data.config import Batching, DataConfig, Shuffle, StreamKind
from deepstack_pl.data.pipeline import PipelineSource, pipeline_loader
from deepstack_pl.data.records import Source
from deepstack_pl.data.stream import ORDER_VERSION, MicroBatchSampler, Position, Stream, train_loader
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.training.ledger import Ledger
from deepstack_pl.training.loader import TimedLoader
from deepstack_pl.training.tally import Tally, over_all

SAMPLES_UNKNOWN = 10_000  # of a stream without an index: what shares of an epoch are taken of
STATE = 2  # the version of what `DeepStackDataModule.state_dict` says


class DeepStackDataModule(lightning.LightningDataModule):
    """Training batches of ``train``, in an order that depends on (fingerprint, seed, step) alone.

    There is no validation loader: validation generates, which is evaluation's callback's own affair; ``val`` is kept
    for it.

    What has been trained on is counted here, batch by batch, and not concluded from Trainer's numbers. A batch counts
    once the optimiser has stepped on it: the gradients of an accumulation broken off are in no checkpoint.

    Attributes:
        stream: the order of the samples; None where they have none (``data.stream=webdataset``).
    """

    def __init__(
        self,
        train: Source | PipelineSource,
        val: Source,
        processor: DeepStackProcessor,
        config: DataConfig,
        seed: int,
        max_steps: int,
        *,
        lengths: Int[ndarray, " n"] | None = None,
        ledger: Ledger | None = None,
        collate: Callable[[list[Any]], MultimodalBatch] | None = None,
    ) -> None:
        """``lengths``: positions, where ``config.batching`` plans with them; ``collate``: not the processor's."""
        super().__init__()
        self.train = train
        self.val = val
        self.processor = processor
        self.config = config
        self.seed = seed
        self.max_steps = max_steps
        self.ledger = ledger
        self._lengths = lengths
        self._collate = collate or processor.collate
        self.stream: Stream | None = None
        if not isinstance(train, PipelineSource):
            self.stream = Stream(train, config, seed, lengths=lengths, capacity=processor.max_length)
        self._loader: TimedLoader | None = None
        self._begin(Position(), Tally())

    def _begin(self, position: Position, before: Tally) -> None:
        self._start = position
        self._before = before  # of all processes, when this session began
        self._mine, self._pending = Tally(), Tally()  # of this process since; trained on, and not stepped on yet
        self._pending_batches = 0
        self._sampler: MicroBatchSampler | None = None
        self._steps = position.step
        self._optimizer_steps = 0

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._begin(Position(), Tally())  # another fit begins anew; a checkpoint is loaded after this

    @property
    def step(self) -> int:
        """Optimiser steps whose batches have been trained on; what workers have fetched ahead does not count."""
        self._count()
        return self._steps

    def tally(self) -> Tally:
        """What has been trained on, of all starts and all processes; every process must ask."""
        self._count()
        return self._before + over_all(self._mine)

    def tally_here(self) -> Tally:
        """The same of this process since it began, and of all before: for where the others may not answer."""
        self._count()
        return self._before + self._mine

    def on_before_batch_transfer(self, batch: MultimodalBatch, dataloader_idx: int) -> MultimodalBatch:
        """Lightning's last word on a batch before it is trained on.

        Raises:
            ValueError: more samples are refused or cut than ``data.max_refused`` and ``data.max_cut`` allow, on all
                processes at once.
        """
        if self.trainer is not None and self.trainer.training:
            self._count()
            self._pending += Tally.of(batch, self._steps)
            self._pending_batches += 1
            if self.ledger is not None:
                self.ledger.write(batch, self._steps, self.trainer.global_rank)
            self._watch(batch)
        return batch

    def _watch(self, batch: MultimodalBatch) -> None:
        troubled = any(batch.cuts) or any(refused is not None for refused in batch.refused)
        if (
            self.trainer is not None and self._world > 1
        ):  # all or none: who stopped alone would leave the others waiting
            troubled = self.trainer.strategy.reduce_boolean_decision(troubled, all=False)
        if not troubled:
            return
        tally = self._before + over_all(self._mine + self._pending)
        # Of whole epochs, so that a bad sample among the first few is no flood.
        epoch = SAMPLES_UNKNOWN if self.stream is None else self.stream.samples
        of = epoch * -(-tally.seen // epoch)
        for what, count, share, setting in (
            ("refused", tally.refused.total(), self.config.max_refused, "max_refused"),
            ("cut", tally.cut_samples, self.config.max_cut, "max_cut"),
        ):
            if count > share * of:
                raise ValueError(self._too_many(what, count, of, f"data.{setting}={share}", batch))

    def _too_many(self, what: str, count: int, of: int, setting: str, batch: MultimodalBatch) -> str:
        if what == "refused":
            newest, remedy = next((refused[1] for refused in batch.refused if refused), ""), "Mend them"
        else:
            cut = [f"{key} ({n} positions)" for key, n in zip(batch.keys, batch.cuts, strict=True) if n]
            newest, remedy = f"Cut in this batch: {', '.join(cut[:3])}.", "Raise llm.max_length"
        return (
            f"{count} of {of:,} samples {what}, more than {setting} allows (a share of an epoch). "
            f"{newest} ledger.jsonl in the run's folder lists all. {remedy}, or raise {setting.partition('=')[0]}."
        )

    def _count(self) -> None:
        """Settle what is pending, if the optimiser has stepped since the last look."""
        steps = self.trainer.global_step if self.trainer is not None else 0
        if self._pending_batches and steps != self._optimizer_steps:
            self._mine += self._pending
            self._steps += 1
            self._pending, self._pending_batches = Tally(), 0
        self._optimizer_steps = steps

    def train_dataloader(self) -> TimedLoader:
        """This process's micro-batches of all steps to come.

        Raises:
            ValueError: the Trainer accumulates otherwise than ``data.batch_size`` and ``data.micro_batch_size`` say.
        """
        accumulation, rank = self.config.accumulation(self._world), 0
        if self.trainer is not None:
            rank, its = self.trainer.global_rank, self.trainer.accumulate_grad_batches
            if its != accumulation:
                size = self.config.micro_batch(self._world)
                raise ValueError(
                    f"Trainer(accumulate_grad_batches={its}), but data.batch_size={self.config.batch_size} in "
                    f"micro-batches of {size} for {self._world} processes are {accumulation}. Give the Trainer that."
                )
        left = max(0, self.max_steps - self._start.step)
        prepare, collate = self.processor.prepare, self._collate
        if isinstance(self.train, PipelineSource):
            loader = pipeline_loader(
                self.config,
                prepare,
                self.processor.blank,
                collate,
                seed=self.seed,
                start_step=self._start.step,
                steps=left,
                rank=rank,
                world=self._world,
            )
        else:
            assert self.stream is not None
            micro = self.config.micro_batch(self._world)
            self._sampler = MicroBatchSampler(
                self.stream, self._start, steps=left, rank=rank, world=self._world, size=micro
            )
            loader = train_loader(
                self.train, prepare, self.processor.blank, collate, self._sampler, self.config, self.seed
            )
        self._loader = TimedLoader(loader, length=self.max_steps * accumulation)
        return self._loader

    def teardown(self, stage: str) -> None:
        if self._loader is not None:  # Lightning ends the workers of DataLoaders alone
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words; every process must ask, and all get the same."""
        tally = self.tally()
        return {
            "version": STATE,
            "position": asdict(self._position()),
            "tally": tally.to_dict(),
            "identity": self.identity(),
            "parts": self.train.parts(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were trained; as `require_same`."""
        self.require_same(state_dict)
        self._begin(Position(**state_dict["position"]), Tally.from_dict(state_dict["tally"]))
        if self.ledger is not None and (self.trainer is None or self.trainer.is_global_zero):
            self.ledger.go_back(self._start.step)
        # Lightning looks for the position in the loader, and would say that it is lost.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def require_same(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint from which the order of samples would not go on.

        Raises:
            ValueError: the data, the seed or what makes batches are not those of the checkpoint.
        """
        if state_dict.get("version") != STATE:
            raise ValueError(
                f"the checkpoint's data state has version {state_dict.get('version')}, this program reads {STATE}: it "
                "was written by another version. Start a new run from its weights with init_from."
            )
        self._require_parts(state_dict["parts"])
        there, here = state_dict["identity"], self.identity()
        for name in {**here, **there}:
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"the checkpoint was trained with {name}={there.get(name)}, this run has {here.get(name)}: the "
                    f"order of samples would not go on where it stopped. Restore {name}, or start a new run from its "
                    "weights with init_from."
                )

    def identity(self) -> dict[str, Any]:
        """All that the order of samples is made from, by the names a user gives it."""
        config = self.config
        values: dict[str, Any] = {
            "data fingerprint": self.train.fingerprint,
            "seed": self.seed,
            "data.batch_size": config.batch_size,
            "data.stream": config.stream.name,
        }
        if config.stream is StreamKind.webdataset:
            return values
        values |= {
            "version of the order": ORDER_VERSION,
            "data.batching": config.batching.name,
            "data.shuffle": config.shuffle.name,
            "data.remainder": config.remainder.name,
        }
        planned = config.batching in (Batching.token_budget, Batching.packed)
        if config.shuffle is Shuffle.blocks:
            values["data.block"] = config.block
        if planned or config.shuffle is Shuffle.blocks:
            values["data.window"] = config.window
        if config.batching is Batching.token_budget:
            values["data.token_budget"] = config.token_budget
        if planned and self._lengths is not None:
            values["lengths of samples"] = hashlib.sha256(np.ascontiguousarray(self._lengths).tobytes()).hexdigest()
        return values

    def _position(self) -> Position:
        """Where the next step's batch begins."""
        step = self.step
        if step == self._start.step:
            return self._start
        return Position(step) if self._sampler is None else self._sampler.position(step)

    def _require_parts(self, there: dict[str, str]) -> None:
        here = self.train.parts()
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if names:
            told = [
                (n, "is new" if n not in there else "is gone" if n not in here else "has other bytes") for n in names
            ]
            first = ", ".join(f"{name} ({what})" for name, what in told[:3])
            raise ValueError(
                f"the data are not those of the checkpoint: {first}{', ...' if len(names) > 3 else ''}; {len(names)} "
                "of "
                f"{len(there)} parts in all. Restore them, or start a new run from its weights with init_from."
            )

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1
