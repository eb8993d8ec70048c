"""The HParams tab, read back as TensorBoard reads it."""

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from deepstack_pl.inspection.hparams import log_hparams

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
