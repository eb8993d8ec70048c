"""The HParams tab, read back as TensorBoard reads it."""

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from deepstack_pl.inspection.hparams import log_hparams
from deepstack_pl.training.loggers import unfailing

VALUES = {
    "model.start_layer": 4,
    "model.taps": [1, 2],
    "llm.name": "tiny",
    "llm.architecture.vocab_size": 512,
    "seed": 0,
    "optim.clip_norm": None,
    "trainer.accelerator": "cpu",
}


def test_a_run_is_one_session_with_its_values_and_its_final_metrics(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="")
    board.log_metrics({"final/fine/accuracy": 0.5}, step=7)
    log_hparams([board, CSVLogger(tmp_path)], VALUES, ["final/fine/accuracy"])
    board.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = HParamsPluginData.FromString(found).session_start_info
    assert set(start.hparams) == {"model.start_layer", "model.taps", "llm.name", "seed"}
    assert start.hparams["model.start_layer"].number_value == 4
    assert start.hparams["model.taps"].string_value == "[1, 2]"
    experiment = HParamsPluginData.FromString(events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content)
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["final/fine/accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("final/fine/accuracy")] == [(7, 0.5)]


@pytest.mark.parametrize("fails", ["before", "here"])
def test_a_logger_whose_disk_is_full_loses_the_tab_and_nothing_else(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = unfailing("tensorboard", partial(TensorBoardLogger, name="", version=""), str(tmp_path))
    spoil: Callable[[], Any] = {
        "before": lambda: board.log_metrics({"loss": 1.0}, step=0),
        "here": lambda: log_hparams([board], VALUES, []),
    }[fails]
    monkeypatch.setattr(board.experiment.file_writer, "add_summary", no_room)
    with pytest.warns(UserWarning, match="logger tensorboard failed .* No space left on device"):
        spoil()
    log_hparams([board], VALUES, [])
