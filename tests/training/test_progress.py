"""Speed, and what a person watches."""

import time
from types import SimpleNamespace

import lightning
import pytest
import torch
from small_run import Pages, small_module, small_processor, small_trainer

from deepstack_pl.data.config import DataConfig
from deepstack_pl.training import throughput
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.flops import FlopsCounter
from deepstack_pl.training.loader import TimedLoader
from deepstack_pl.training.progress import LogLine, TrainingBar, progress
from deepstack_pl.training.throughput import Throughput


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Time passes by sleeping, and a thousandth of a second with each look: on a busy machine, too."""
    now = [0.0]

    def pass_by(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(time, "sleep", pass_by)
    monkeypatch.setattr(time, "perf_counter", lambda: pass_by(0.001))


class Sleeper(lightning.Callback):
    """Spends time between steps, as validation does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.2)


class SlowPages(Pages):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def fit(folder, *callbacks, pages=None, steps=4, **more):
    config = DataConfig(name="x", batch_size=3, workers=0)
    data = DeepStackDataModule(pages or Pages(), Pages(4), small_processor(), config, 0, steps)
    trainer = small_trainer(folder, steps, callbacks=list(callbacks), **more)
    trainer.fit(small_module(steps=steps), datamodule=data)
    return trainer


def test_a_loader_counts_only_the_time_that_its_consumer_waits():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    loader = TimedLoader(slow(), length=3)
    seen = []
    for number in loader:
        time.sleep(0.05)
        seen.append(number)
    assert seen == [0, 1, 2]
    assert len(loader) == 3
    assert 0.05 < loader.waited < 0.12


def test_tokens_are_those_that_are_no_padding(tmp_path):
    speed = Throughput(every_steps=2)
    fit(tmp_path, speed, steps=2)
    processor, pages = small_processor(), Pages()
    lengths = [len(processor.prepare(pages[i]).input_ids) for i in range(len(pages))]
    per_sample = speed.last["speed/tokens_per_second"] / speed.last["speed/samples_per_second"]
    assert min(lengths) <= per_sample <= max(lengths)


def test_time_between_steps_is_no_training_time(tmp_path):
    speed = Throughput(every_steps=4)
    fit(tmp_path, speed, Sleeper())
    assert speed.last["speed/step_seconds"] < 0.2


def test_overall_speed_covers_every_step_of_the_run_and_nothing_between_steps(tmp_path):
    speed, start = Throughput(every_steps=4), time.perf_counter()
    assert speed.tokens_per_second_overall is None
    fit(tmp_path, speed, Sleeper(), pages=SlowPages(), steps=6)
    assert 6 * 3 * 0.02 < speed.seconds_training < time.perf_counter() - start - 6 * 0.2
    processor, pages = small_processor(), Pages()
    lengths = [len(processor.prepare(pages[i]).input_ids) for i in range(len(pages))]
    tokens = speed.tokens_per_second_overall * speed.seconds_training
    assert 6 * 3 * min(lengths) <= round(tokens, 3) <= 6 * 3 * max(lengths)


def test_a_new_session_counts_from_nothing(tmp_path):
    speed = Throughput(every_steps=4)
    fit(tmp_path, speed, steps=6)
    module = small_module()
    module.configure_model()
    speed.on_train_start(None, module)
    assert (speed.seconds_training, speed.tokens_per_second_overall) == (0.0, None)


def test_waiting_for_data_is_a_share_of_the_time(tmp_path):
    fast, slow = Throughput(every_steps=4), Throughput(every_steps=4)
    fit(tmp_path, fast)
    fit(tmp_path, slow, pages=SlowPages())
    assert 0 <= fast.last["speed/data_wait_share"] < slow.last["speed/data_wait_share"] < 1


def test_every_number_of_a_window_is_of_the_batches_in_it(tmp_path):
    """Twelve pages in batches of three, the longer ones with the shorter: what is logged follows from the samples."""
    speed = Throughput(every_steps=4)
    trainer = fit(tmp_path, speed)
    processor, pages, stream = small_processor(), Pages(), trainer.datamodule.stream
    batches = [processor.collate([processor.prepare(pages[i]) for (i,) in units]) for units in stream.epoch_batches(0)]
    samples, tokens, learned = 12, sum(sum(b.lengths) for b in batches), sum(len(b.targets) for b in batches)
    seconds = samples / speed.last["speed/samples_per_second"]
    assert speed.last["speed/tokens_per_second"] * seconds == pytest.approx(tokens)
    assert speed.last["speed/supervised_tokens_per_second"] * seconds == pytest.approx(learned)
    positions = sum(b.input_ids.numel() for b in batches)
    assert positions > tokens
    assert speed.last["speed/padding_share"] == pytest.approx(1 - tokens / positions)
    network = trainer.lightning_module.network
    counter, flops = FlopsCounter(network), 0.0
    for batch in batches:
        network(**batch.training_inputs(), use_cache=False)
        flops += counter.of(batch)
    assert speed.last["speed/model_flops_per_second"] * seconds == pytest.approx(flops)
    assert "speed/mfu" not in speed.last, "of a CPU no peak is known"
    assert not any(name.startswith(("speed_min", "speed_max")) for name in speed.last)


def test_of_two_unequal_processes_there_is_the_sum_the_mean_the_least_and_the_most(monkeypatch):
    """One makes two steps in 2 s, the other in 4 s, of which it waits for one: a step is over when both are."""
    one = {"tokens": 100, "supervised": 40, "samples": 4, "positions": 200, "flops": 1e12, "seconds": 2, "waited": 0}
    other = {"tokens": 300, "supervised": 60, "samples": 8, "positions": 400, "flops": 3e12, "seconds": 3, "waited": 1}
    monkeypatch.setattr(throughput, "peak_of", lambda device, half: 1e12)
    monkeypatch.setattr(throughput, "from_all", lambda mine: [mine, other])
    monkeypatch.setattr(throughput, "several", lambda: True)
    shown, loader = {}, TimedLoader(lambda: iter(()), length=0)
    speed = Throughput(every_steps=2, precision="bf16-true")
    speed._window, speed._steps = one, 2
    module = SimpleNamespace(log_dict=lambda values, **how: shown.update(values))
    speed._report(SimpleNamespace(train_dataloader=loader, loggers=[], global_step=2), module, torch.device("cpu"))
    assert speed.last == {
        "speed/tokens_per_second": 100,
        "speed/supervised_tokens_per_second": 25,
        "speed/samples_per_second": 3,
        "speed/model_flops_per_second": 1e12,
        "speed/padding_share": pytest.approx(1 / 3),
        "speed/mfu": 0.5,
        "speed/step_seconds": 1.25,
        "speed/data_wait_share": 0.125,
        "speed_min/step_seconds": 1,
        "speed_min/data_wait_share": 0,
        "speed_min/tokens_per_second": 50,
        "speed_max/step_seconds": 1.5,
        "speed_max/data_wait_share": 0.25,
        "speed_max/tokens_per_second": 75,
    }
    assert shown == {"tok/s": 100, "pad": pytest.approx(1 / 3), "wait": 0.125, "mfu": 0.5}


def test_the_utilisation_is_a_share_of_the_devices_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_of", lambda device, half: 1e12 if half else None)
    speed = Throughput(every_steps=2, precision="bf16-mixed")
    trainer = fit(tmp_path, speed, TrainingBar(), enable_progress_bar=True)
    assert speed.last["speed/mfu"] == pytest.approx(speed.last["speed/model_flops_per_second"] / 1e12)
    numbers = trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module)
    assert str(numbers["mfu"]).endswith("%")


def test_a_log_line_shows_where_the_run_stands(tmp_path, capsys):
    fit(tmp_path, Throughput(every_steps=1), LogLine(every_steps=3), steps=7, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "6/7"]
    for line in lines[1:]:
        assert all(word in line for word in ("loss", "tok/s", "wait", "left 0:00:"))
        assert "v_num" not in line


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(progress(), TrainingBar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert isinstance(progress(5), LogLine)


def test_the_bar_runs(tmp_path):
    trainer = fit(tmp_path, TrainingBar(), Throughput(every_steps=1), enable_progress_bar=True)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, TrainingBar)
    numbers = bar.get_metrics(trainer, trainer.lightning_module)
    assert set(numbers) == {"loss", "tok/s", "pad", "wait"}
    assert str(numbers["wait"]).endswith("%")


@pytest.mark.parametrize("make", [Throughput, LogLine])
def test_windows_of_no_steps_are_refused(make):
    with pytest.raises(ValueError, match="every_steps=0"):
        make(0)
