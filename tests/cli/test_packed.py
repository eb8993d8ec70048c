"""Runs whose rows hold several samples: what they learn, and where they go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import StopEarly, go_on, run_of, start

from deepstack_pl.cli import assemble
from deepstack_pl.cli.assemble import make_processor, open_data
from deepstack_pl.cli.layout import collate_of, lengths_of, rows_are_shared
from deepstack_pl.data.sources import ShardSource

PACKED = ("data.batching=packed", "data.batch_size=2", "llm.max_length=240", "data.fine_print.train_pages=16")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def close(one: Path, other: Path, tolerance: float) -> None:
    first, second = weights(one), weights(other)
    for name, values in first.items():
        torch.testing.assert_close(
            second[name], values, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_packed_run_learns_the_same_by_every_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for kernel in ("sdpa", "varlen"):
        results[kernel] = start(*PACKED, f"llm.attention={kernel}", folder=tmp_path / kernel)
        assert "samples of one row do not see each other" in capsys.readouterr().out
    assert results["sdpa"]["data"]["order_digest"] == results["varlen"]["data"]["order_digest"]
    assert results["sdpa"]["data"]["trained"]["samples"] > 3 * 2, "rows hold more than a sample each"
    close(tmp_path / "sdpa", tmp_path / "varlen", 1e-5)


def test_samples_side_by_side_learn_what_padded_rows_learn(tmp_path: Path) -> None:
    """llm.attention=varlen changes no sample and no step, but leaves out the padding."""
    for kernel in ("sdpa", "varlen"):
        start(f"llm.attention={kernel}", folder=tmp_path / kernel)
    close(tmp_path / "sdpa", tmp_path / "varlen", 1e-5)


@pytest.mark.parametrize("kernel", ["varlen", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_a_packed_run_goes_on_bit_for_bit(tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*PACKED, f"llm.attention={kernel}", "trainer.max_steps=4", "callbacks.checkpoint.every_steps=2")
    start(*words, folder=tmp_path / "whole")
    own = assemble.machines

    def cut_short(run: Any, folder: Path) -> Any:
        return [*own(run, folder), StopAfterTwo()]

    monkeypatch.setattr(assemble, "machines", cut_short)
    start(*words, folder=tmp_path / "cut")
    monkeypatch.setattr(assemble, "machines", own)
    results = go_on(f"ckpt_path={tmp_path / 'cut'}")
    assert results["steps"] == 4
    close(tmp_path / "whole", tmp_path / "cut", 0.0)


class StopAfterTwo(StopEarly):
    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2


def test_rows_are_filled_and_side_by_side_nothing_is_padded() -> None:
    for words, shape in (
        ((), (4, None)),
        (PACKED, (2, None)),
        (("llm.attention=varlen",), (1, None)),
        ((*PACKED, "llm.attention=varlen"), (1, None)),
    ):
        config = run_of("data.batch_size=4", "data.fine_print.train_pages=16", *words)
        processor = make_processor(config)
        train, _ = open_data(config)
        assert isinstance(train, ShardSource)
        lengths = lengths_of(train, processor, config)
        samples = [processor.prepare(train[number]) for number in range(4)]
        rows: Any = [samples[:2], samples[2:]] if config.data.batching.name == "packed" else samples
        batch = collate_of(config, processor)(rows)
        assert len(batch.input_ids) == shape[0]
        assert (lengths is not None) == (config.data.batching.name == "packed")
        assert rows_are_shared(config) == bool(words)
        if config.llm.attention.name == "varlen":
            assert batch.attention_mask.all()
