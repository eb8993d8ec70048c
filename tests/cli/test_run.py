"""One run in this process: how it ends, how it goes on, what its results say."""

import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, go_on, results_of, run_of, start

from deepstack_pl.batch import Reason, Record, Refused, Role, Turn
from deepstack_pl.cli import run as cli_run
from deepstack_pl.cli import trial
from deepstack_pl.cli.assemble import make_processor
from deepstack_pl.cli.folders import Live
from deepstack_pl.cli.layout import collate_of, worst_rows
from deepstack_pl.cli.provenance import Memory
from deepstack_pl.cli.run import execute
from deepstack_pl.cli.surroundings import share_cores
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.sources import open_sources
from deepstack_pl.files import hold, is_held, let_go
from deepstack_pl.training.module import DeepStackModule
from deepstack_pl.training.store import SaveFailed

TWICE = ("+callbacks.twice={_target_: tiny_run.CtrlCTwice}", "callbacks.checkpoint.every_steps=1")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_that_a_callback_ends_early_is_not_finished() -> None:
    results = start("+callbacks.early={_target_: tiny_run.StopEarly}", folder=Path("run"))
    assert (results["status"], results["steps"]) == ("interrupted", 1)


def test_a_second_ctrl_c_interrupts_and_says_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(*TWICE, folder=Path("run"))
    results = results_of(Path("run"))
    assert (results["status"], results["interrupted"], results["steps"]) == ("interrupted", True, 2)
    said = capsys.readouterr().out
    assert "at step 2. To go on from step 2, the newest checkpoint's: python train.py ckpt_path=run" in said


def test_ctrl_c_during_the_last_evaluation_keeps_what_training_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        start(folder=Path("run"))
    results = results_of(Path("run"))
    assert (results["status"], results["steps"]) == ("interrupted", 3)
    assert results["tokens_per_second"] > 0
    assert results["data"]["order_digest"]


def test_without_a_checkpoint_nothing_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    start("+callbacks.early={_target_: tiny_run.StopEarly}", "callbacks.checkpoint=null", folder=Path("run"))
    said = capsys.readouterr().out
    assert "Interrupted at step 1." in said
    assert "To go on" not in said


@pytest.mark.slow
def test_every_start_is_recorded_and_speed_outlives_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    first = start(folder=Path("run"))
    assert (first["status"], first["steps"], len(first["starts"])) == ("finished", 3, 1)
    assert 0 < first["seconds"]["train"] <= first["seconds"]["fit"]
    (Path("run") / "results.json").write_text(json.dumps({**first, "versions": {}, "git": {}, "steps": 1}))
    more = go_on("ckpt_path=run", "trainer.max_steps=5")
    assert "from run/checkpoints/step-00000003 (step 3)" in capsys.readouterr().out
    assert [begun["step"] for begun in more["starts"]] == [0, 3]
    assert more["versions"] == first["versions"]
    assert more["init_digest"] == first["init_digest"]
    assert more["data"]["order_digest"] != first["data"]["order_digest"]
    (Path("run") / "results.json").write_text(json.dumps({**more, "status": "failed"}))
    evaluated = go_on("ckpt_path=run")  # the weights are those of the last step
    assert evaluated["status"] == "finished"
    for name in ("tokens_per_second", "data"):
        assert evaluated[name] == more[name]
    assert evaluated["seconds"]["train"] == more["seconds"]["train"]
    go_on("ckpt_path=run/checkpoints/step-00000003", "trainer.max_steps=6")
    assert "from run/checkpoints/step-00000003 (step 3)" in capsys.readouterr().out


def test_init_from_is_recorded_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(folder=Path("one"))["init_from"] is None
    assert start("init_from=one", folder=Path("two"))["init_from"] == "one"
    assert "starting from the weights of one" in capsys.readouterr().out


@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_the_report_names_tensorboard_where_it_has_something_to_show(
    logger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in TINY if word != "~logger"]
    execute(run_of(*words, f"logger={logger}"), Path("run"), "python train.py")
    assert ("tensorboard --logdir outputs" in capsys.readouterr().out) is (logger == "tensorboard")


@pytest.mark.slow
def test_deepstack_l_hd_trains_proven_and_counts_what_it_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    whole = start("model=deepstack_l_hd", folder=Path("whole"))
    assert (whole["status"], whole["receipt"]) == ("finished", {"ok": True, "injections": 4})
    assert whole["tokens_per_image"] == {"seen": 25 * 16, "context": 5 * 16 + 4 * 4}  # 1 x 4 tiles: most newlines
    assert whole["data"]["trained"]["cut_positions"] == 0
    assert "cut:" not in capsys.readouterr().out
    length = len(
        make_processor(run_of(*TINY, "model=deepstack_l_hd")).prepare(open_sources(run_of(*TINY).data)[0][0]).labels
    )
    cut = ("model=deepstack_l_hd", f"llm.max_length={length - 3}")
    with pytest.raises(ValueError, match=r"samples refused, more than data\.max_refused=0\.0.*llm\.too_long=cut_text"):
        start(*cut, "llm.too_long=refuse", folder=Path("refused"))
    with pytest.raises(ValueError, match=r"samples cut, more than data\.max_cut=0\.05.*Raise llm\.max_length"):
        start(*cut, folder=Path("too many"))
    for how in ("cut", "cut_text"):
        folder = Path(how)
        trained = start(*cut, f"llm.too_long={how}", "data.max_cut=1", folder=folder)["data"]["trained"]
        assert trained["cut_positions"] == 3 * 4 * 3, "three steps of four samples, all of one length"
        assert "cut: 12 samples longer than llm.max_length, 36 positions" in capsys.readouterr().out
        assert len((folder / "ledger.jsonl").read_text().splitlines()) == 12


def test_a_peak_of_an_earlier_run_is_not_reported_as_this_ones() -> None:
    memory = Memory.begin()
    assert "process_peak" not in Memory(before=2**60).peaks()
    assert Memory(before=0).peaks()["process_peak"] >= memory.before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say what it lends")
def test_threads_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    share_cores(run_of("data.workers=1"))
    assert told == [2]


def test_a_run_of_before_later_values_starts_others() -> None:
    """Its config.json says nothing of values that came later."""
    start("callbacks.checkpoint.every_steps=1", folder=Path("old"))
    values = json.loads(Path("old/config.json").read_text())
    for key in ("projector_sharing", "sample_too_long", "published"):
        del values[key]
    del values["vision"]["layer_norm_eps"]
    later = ("resize", "detail", "encoding", "pooling", "order", "unfilled", "newline")
    values["plan"] = {name: value for name, value in values["plan"].items() if name not in later}
    for injection in values["plan"]["injections"]:
        del injection["source"]
    Path("old/config.json").write_text(json.dumps(values))
    assert start("init_from=old", folder=Path("new"))["status"] == "finished"


def test_a_question_that_is_too_long_is_refused_before_the_first_step() -> None:
    processor, (_, val) = make_processor(run_of(*TINY)), open_sources(run_of(*TINY).data)
    length = max(len(processor.prompt(val[i]).input_ids) for i in range(len(val)))
    with pytest.raises(ValueError, match="Questions are never cut"):
        start("llm.too_long=cut", f"llm.max_length={length - 1}", folder=Path("refused"))
    assert results_of(Path("refused"))["steps"] == 0


def test_a_refusal_to_go_on_changes_nothing_on_disk() -> None:
    start(folder=Path("run"))
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("noise: 2.0", "noise: 3.0"))  # other pages
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="not those of the checkpoint"):
        go_on("ckpt_path=run", "trainer.max_steps=5")
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before


def test_a_run_that_fails_says_what_it_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            raise RuntimeError("as arranged")
        return step(self, batch, batch_idx)

    step = DeepStackModule.training_step
    monkeypatch.setattr(DeepStackModule, "training_step", stop)
    with pytest.raises(RuntimeError, match="as arranged"):
        start(folder=Path("broken"))
    results = results_of(Path("broken"))
    assert (results["status"], results["steps"]) == ("failed", 2)
    assert results["data"]["trained"]["samples"] == 2 * 4
    assert results["data"]["order_digest"]


def test_a_disk_that_is_full_does_not_hide_what_ended_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop(self: object, batch: object, batch_idx: int) -> None:
        monkeypatch.setattr(cli_run, "write_results", no_room)
        raise SaveFailed("as arranged")

    monkeypatch.setattr(DeepStackModule, "training_step", stop)
    with pytest.raises(SaveFailed, match="as arranged"):
        start(folder=Path("broken"))


def test_a_folder_that_another_process_trains_in_is_left_alone() -> None:
    start(folder=Path("run"))
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    assert not is_held(Path("run"))
    other = hold(Path("run"))
    try:
        with pytest.raises(Live, match=r"run is being trained in by another process\. .*, or stop it\.$"):
            go_on("ckpt_path=run", "trainer.max_steps=4")
        with pytest.raises(Live, match=r"name another folder with hydra\.run\.dir"):
            start(folder=Path("run"))
    finally:
        let_go(other)
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before
    assert go_on("ckpt_path=run", "trainer.max_steps=4")["steps"] == 4


def test_a_run_holds_its_folder_and_its_workers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    def look(self: DeepStackModule, batch: object, batch_idx: int) -> torch.Tensor:
        held.append(is_held(Path("run")))
        return step(self, batch, batch_idx)

    step = DeepStackModule.training_step
    monkeypatch.setattr(DeepStackModule, "training_step", look)
    start(folder=Path("run"))
    assert len(held) >= 3
    assert all(held)
    handle = hold(Path("run"))
    child = os.fork()
    if not child:  # as a data worker, which may outlive a killed run
        time.sleep(60)
        os._exit(0)
    try:
        let_go(handle)
        until = time.monotonic() + 30
        while is_held(Path("run")):  # the child lets go as soon as it comes to run
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_trial_step_is_the_worst_case_and_not_the_longest_text(tmp_path: Path) -> None:
    """Pictures are short and chats are long: memory goes to rows that are both."""
    processor = make_processor(run_of(*TINY))
    short = Turn(Role.user, "<image>?"), Turn(Role.assistant, "a")
    picture = Record(key="picture", turns=short, images=(Image.new("RGB", (64, 64)),))
    chat = Record(key="chat", turns=(Turn(Role.user, "?"), Turn(Role.assistant, "word " * 50)), images=())
    samples = [processor.prepare(record) for record in (picture, chat)]
    run = run_of(*TINY)
    longest = len(samples[1].input_ids)
    rows = worst_rows(samples, run, longest)
    assert len(rows) == run.data.micro_batch()
    (worst,) = rows[0]
    assert (len(worst.views), len(worst.input_ids)) == (5, longest)
    assert torch.equal(worst.input_ids[: len(samples[0].input_ids)], samples[0].input_ids)
    assert len(worst.labels) == len(worst.token_index) == len(worst.input_ids)
    assert len(worst_rows(samples, run, 300)[0][0].input_ids) == 300


def test_a_trial_step_fills_every_packed_row_with_the_most_views_that_it_holds() -> None:
    run = run_of(*TINY, "data.batching=packed", "data.batch_size=4", "data.micro_batch_size=2", "llm.max_length=100")
    processor = make_processor(run)
    short = Turn(Role.user, "<image>?"), Turn(Role.assistant, "a")
    sample = processor.prepare(Record(key="picture", turns=short, images=(Image.new("RGB", (64, 64)),)))
    fit = 100 // len(sample.input_ids)
    assert fit > 1
    rows = worst_rows([sample], run, longest=10**6)
    assert [len(row) for row in rows] == [fit, fit]
    assert [sum(len(each.input_ids) for each in row) for row in rows] == [100, 100]
    batch = collate_of(run, processor)(rows)
    assert (batch.packed, tuple(batch.input_ids.shape), len(batch.views)) == (True, (2, 100), 2 * fit * 5)


def test_a_trial_step_fills_a_token_budget_with_the_most_views_that_it_holds() -> None:
    """Many short samples of one image bring more views than a few long ones of two."""
    processor = make_processor(run_of(*TINY))
    image = Image.new("RGB", (64, 64))
    album = Turn(Role.user, "<image><image>" + "word " * 60), Turn(Role.assistant, "a")
    short = Turn(Role.user, "<image>?"), Turn(Role.assistant, "a")
    samples = [
        processor.prepare(Record(key="album", turns=album, images=(image, image))),
        processor.prepare(Record(key="short", turns=short, images=(image,))),
    ]
    long, least = (len(sample.input_ids) for sample in samples)
    run = run_of(*TINY, "data.batching=token_budget", f"data.token_budget={5 * long}", "data.micro_batch_size=null")
    rows = 5 * long // least
    assert rows > 10, "else the album's views are as many"
    found = worst_rows(samples, run, longest=10**6)
    (worst,) = found[0]
    length = len(worst.input_ids)
    assert (worst.key, len(found)) == ("short", rows)
    assert rows * length <= 5 * long < rows * (length + 1)
    assert len(worst_rows(samples, run, longest=least)[0][0].input_ids) == least


def test_a_trial_looks_for_the_most_images_and_the_least_text_beyond_the_first_samples() -> None:
    class Source:
        def __init__(self) -> None:
            self.images, self.text = np.array([1] * 400 + [0] * 100), np.full(500, 50)
            self.read: list[int] = []

        @property
        def columns(self) -> Columns:
            return replace(Columns.plain(500), images=self.images, text=self.text)

        def __len__(self) -> int:
            return 500

        def __getitem__(self, index: int) -> Record:
            self.read.append(index)
            raise Refused(Reason.image, "as arranged")

    source = Source()
    source.images[300], source.text[310], source.text[320], source.text[450] = 2, 60, 10, 5
    with pytest.raises(Refused, match="as arranged"):
        trial._looked_at(cast(Any, source), make_processor(run_of(*TINY)))
    assert source.read == [*range(256), 300, 310, 320], "450 is short, and has no image"
