"""Lengths: measured once, by as many processes as asked, kept under what they depend on."""

import os
from pathlib import Path

import numpy as np
import pytest
from numbered import Numbers

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.data import lengths as lengths_module
from deepstack_pl.data.lengths import measure_lengths
from deepstack_pl.data.records import Outline


def count(outline: Outline) -> int:
    """Seven times its number and one; what a process can import by name."""
    return 7 * int(outline.key) + 1


def count_and_refuse(outline: Outline) -> int:
    if outline.key == "4":
        raise Refused(Reason.conversation, "4: nobody answers.")
    return count(outline)


def forbidden(outline: Outline) -> int:
    raise AssertionError("measured again")


def broken(outline: Outline) -> int:
    raise OSError("the disk is gone")


def test_each_sample_has_its_own_length_and_a_refused_one_none(tmp_path: Path) -> None:
    found = measure_lengths(Numbers(6, bad=(2,)), count_and_refuse, "digest", tmp_path)
    assert found.tolist() == [1, 8, 0, 22, 0, 36]


@pytest.mark.slow
def test_several_processes_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_AT_ONCE", 4)
    source = Numbers(11, bad=(2,))
    alone = measure_lengths(source, count, "digest", tmp_path / "one")
    together = measure_lengths(source, count, "digest", tmp_path / "two", processes=2)
    assert together.tolist() == alone.tolist() == [0 if n == 2 else 7 * n + 1 for n in range(11)]


def test_what_was_measured_is_read_again_until_data_or_processor_change(tmp_path: Path) -> None:
    first = measure_lengths(Numbers(6), count, "digest", tmp_path)
    assert measure_lengths(Numbers(6), forbidden, "digest", tmp_path).tolist() == first.tolist()
    for source, digest in ((Numbers(6, "other"), "digest"), (Numbers(6), "other")):
        with pytest.raises(AssertionError, match="measured again"):
            measure_lengths(source, forbidden, digest, tmp_path)


@pytest.mark.slow
def test_what_goes_wrong_is_raised_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_AT_ONCE", 4)
    for processes in (1, 2):
        with pytest.raises(OSError, match="the disk is gone"):
            measure_lengths(Numbers(11), broken, "digest", tmp_path, processes)
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_is_cut_off_leaves_nothing_that_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            measure_lengths(Numbers(6), count, "digest", tmp_path)
    assert measure_lengths(Numbers(6), count, "digest", tmp_path)[5] == 36


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_what_is_kept_and_damaged_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    measure_lengths(Numbers(6), count, "digest", tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "other":
        np.save(file, np.zeros(5, np.int64))
    else:
        file.write_bytes(file.read_bytes()[: -3 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=rf"{file.name}: not the lengths of 6 samples .* Delete it"):
        measure_lengths(Numbers(6), count, "digest", tmp_path)
