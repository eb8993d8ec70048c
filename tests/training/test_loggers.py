"""A logger that fails is named and left alone; training goes on."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers import wandb as lightning_wandb

from deepstack_pl.training import loggers
from deepstack_pl.training.loggers import unfailing


class Board:
    """A writer of pictures."""

    colour = "red"

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def add_image(self, name: str) -> None:
        self.pictures.append(name)
        raise OSError("No space left on device")


class Fragile(Logger):
    """Fails where ``breaks`` says, and counts what it is asked for."""

    def __init__(self, save_dir: str, breaks: str = "") -> None:
        super().__init__()
        self.breaks, self.calls, self.board = breaks, list[str](), Board()

    name, version = "fragile", 0

    @property
    def experiment(self) -> Board:
        self._reach("experiment")
        return self.board

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._reach("log_metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._reach("log_hyperparams")

    def save(self) -> None:
        self._reach("save")

    def finalize(self, status: str) -> None:
        self._reach("finalize")

    def _reach(self, what: str) -> None:
        self.calls.append(what)
        if what == self.breaks:
            raise ConnectionError("no answer")


class Toy(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        for logger in self.loggers:
            logger.experiment.add_image(f"page {batch_idx}")
        self.log("train/loss", 0.5)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, *given: Logger) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        logger=given,
        log_every_n_steps=1,
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*isinstance.*LeafSpec.*")
        trainer.fit(Toy(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    return trainer


def fragile(breaks: str, name: str = "mine") -> Fragile:
    made = unfailing(name, partial(Fragile, breaks=breaks), "somewhere")
    assert isinstance(made, Fragile)
    return made


@pytest.mark.parametrize("breaks", ["experiment", "log_metrics", "save", "finalize"])
def test_training_goes_on_without_a_logger_that_fails_and_it_is_said_once(breaks: str, tmp_path: Path) -> None:
    logger = fragile(breaks)
    logger.board.add_image = logger.board.pictures.append  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="logger mine failed .* ConnectionError: no answer") as said:
        trainer = fit(tmp_path, logger)
    assert trainer.global_step == 3
    assert len([w for w in said if "left alone" in str(w.message)]) == 1
    assert logger.calls.count(breaks) == 1
    assert logger.calls[-1] == breaks


def test_pictures_that_cannot_be_written_stop_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    broken, sound = fragile("", "broken"), fragile("", "sound")
    sound.board.add_image = sound.board.pictures.append  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="logger broken failed .* No space left on device"):
        trainer = fit(tmp_path, broken, sound)
    assert trainer.global_step == 3
    assert broken.board.pictures == ["page 0"]
    assert sound.board.pictures == ["page 0", "page 1", "page 2"]
    assert sound.calls.count("log_metrics") == 3


def test_it_is_of_the_class_that_was_asked_for_and_its_writer_serves_as_before(tmp_path: Path) -> None:
    logger = unfailing("tensorboard", partial(TensorBoardLogger, name="", version=""), str(tmp_path))
    assert isinstance(logger, TensorBoardLogger)
    logger.experiment.add_scalar("x", 1.0, 0)
    logger.finalize("success")
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert fragile("").experiment.colour == "red"


def test_an_end_from_outside_is_no_failure() -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    logger = fragile("")
    logger.board.add_image = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        logger.experiment.add_image("page")


def test_only_process_0_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "rank", lambda: 1)
    logger = fragile("")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.add_image("page")
    logger.finalize("success")
    assert logger.calls == []


def test_what_cannot_be_made_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^logger\.csv: .*unexpected keyword argument 'nmae'"):
        unfailing("csv", partial(CSVLogger, nmae="x"), "somewhere")
    with pytest.raises(ValueError, match=r"is no class of loggers\. Name one in logger\.mine\._target_"):
        unfailing("mine", partial(print), "somewhere")
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"^logger=wandb: .* Install what is missing, or take another logger="):
        unfailing("wandb", partial(WandbLogger), "somewhere")
