"""What the fine print set promises: which view shows what, in which format, the same bytes every time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepstack_pl.data.config import FinePrintConfig
from deepstack_pl.data.fine_print import COARSE_QUESTION, COLOURS, FINE_QUESTION, WEAVES, draw_page, write_fine_print
from deepstack_pl.data.loom import Loom
from deepstack_pl.data.shards import file_sha256
from deepstack_pl.data.sources import ShardSource

CONFIG = FinePrintConfig()
PAGES, TRAIN_PAGES = 1000, 400
MARGIN = 2  # pixels of the neighbours that a probe sees as well: as far as the resize reaches


def seen_at(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), np.float32)


def cells_of(view: np.ndarray, margin: int) -> list[np.ndarray]:
    cell = len(view) // CONFIG.cells
    padded = np.pad(view, np.array([[margin] * 2, [margin] * 2, [0, 0]]), mode="reflect")
    starts = range(0, len(view), cell)
    return [padded[y : y + cell + 2 * margin, x : x + cell + 2 * margin] for y in starts for x in starts]


@pytest.fixture(scope="module")
def swatches() -> dict[str, np.ndarray]:
    """Every swatch of 1000 pages: as the global view and as the enlarged image shows it, and what it is."""
    loom = Loom(CONFIG)
    small, enlarged, weaves, colours = [], [], [], []
    for number in range(PAGES):
        page = draw_page(loom, "train", number)
        small += cells_of(seen_at(page.pixels, CONFIG.view_size), MARGIN)
        enlarged += cells_of(seen_at(page.pixels, 2 * CONFIG.view_size), 0)
        weaves.append(page.weaves.ravel())
        colours.append(page.colours.ravel())
    return {
        "small": np.stack(small),
        "enlarged": np.stack(enlarged),
        "weaves": np.concatenate(weaves),
        "colours": np.concatenate(colours),
    }


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a least-squares classifier on the pages it was not fitted to."""
    features = features.reshape(len(features), -1)
    split = TRAIN_PAGES * CONFIG.cells**2
    fitted = features[:split]
    features = np.c_[(features - fitted.mean(0)) / (fitted.std(0) + 1e-6), np.ones(len(features))]
    targets = np.eye(labels.max() + 1)[labels]
    gram = features[:split].T @ features[:split] + np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[:split].T @ targets[:split])
    return float(((features[split:] @ weights).argmax(1) == labels[split:]).mean())


def steps_between_pixels(images: np.ndarray) -> np.ndarray:
    grey = images.mean(-1)
    across, down = np.abs(np.diff(grey, axis=2)), np.abs(np.diff(grey, axis=1))
    return np.concatenate([across.reshape(len(grey), -1), down.reshape(len(grey), -1)], axis=1)


def test_linear_probe_on_the_global_view_is_within_two_points_of_chance_on_fine_facts(swatches: dict) -> None:
    # 9600 swatches that the probe has not seen: its standard error is 0.44 points.
    assert abs(probe(swatches["small"], swatches["weaves"]) - 1 / CONFIG.weaves) < 0.02


def test_probe_of_absolute_differences_on_the_global_view_is_near_chance_on_fine_facts(swatches: dict) -> None:
    assert abs(probe(steps_between_pixels(swatches["small"]), swatches["weaves"]) - 1 / CONFIG.weaves) < 0.03


def test_the_same_probe_on_the_enlarged_image_reads_fine_facts(swatches: dict) -> None:
    assert probe(steps_between_pixels(swatches["enlarged"]), swatches["weaves"]) > 0.99


def test_every_swatch_of_the_global_view_is_nearest_to_its_own_dye(swatches: dict) -> None:
    middles = swatches["small"][:, 5:-5, 5:-5].mean((1, 2))
    distances = np.linalg.norm(middles[:, None] - np.asarray(list(COLOURS.values())), axis=-1)
    assert np.array_equal(distances.argmin(1), swatches["colours"])


def test_a_weave_changes_no_pixel_of_the_global_view_by_more_than_rounding() -> None:
    loom = Loom(CONFIG)
    rng = np.random.default_rng(0)
    shape = (CONFIG.cells, CONFIG.cells)
    for seed in range(10):
        colours, polarity = rng.integers(len(COLOURS), size=shape), rng.integers(2, size=shape) * 2 - 1
        weaves = rng.integers(CONFIG.weaves, size=shape)
        woven = loom.render(colours, weaves, polarity, np.random.default_rng(seed))
        plain = loom.render(colours, weaves * 0, polarity, np.random.default_rng(seed))
        change = seen_at(woven, CONFIG.view_size) - seen_at(plain, CONFIG.view_size)
        assert np.abs(change).max() <= 1
        assert np.abs(change.mean()) < 0.05


@pytest.mark.parametrize(("weave", "levels"), [(1, 43.8), (2, 43.8), (3, 27.9)])  # a check is shrunk in both directions
def test_every_weave_is_legible_in_the_enlarged_image(weave: int, levels: float) -> None:
    loom = Loom(CONFIG)
    shape = (CONFIG.cells, CONFIG.cells)
    pages = [
        loom.render(np.zeros(shape, int), np.full(shape, kind), np.ones(shape, int), np.random.default_rng(0))
        for kind in (weave, 0)
    ]
    change = seen_at(pages[0], 2 * CONFIG.view_size) - seen_at(pages[1], 2 * CONFIG.view_size)
    quarter = 2 * CONFIG.view_size // CONFIG.cells // 4
    middles = [np.abs(cell[quarter:-quarter, quarter:-quarter]).mean() for cell in cells_of(change, 0)]
    assert middles == pytest.approx([levels] * CONFIG.cells**2, abs=1)


@pytest.mark.parametrize(("view_size", "cells"), [(32, 1), (32, 2), (32, 8), (48, 6), (64, 16), (336, 8)])
def test_threads_of_full_contrast_fit_every_size_and_vanish_in_its_global_view(view_size: int, cells: int) -> None:
    loom = Loom(FinePrintConfig(view_size=view_size, cells=cells))
    for pattern in loom.patterns:
        page = Image.fromarray(np.tile(pattern, (cells, cells)))
        shrunk = np.asarray(page.resize((view_size, view_size), Image.Resampling.BICUBIC))
        assert np.abs(shrunk).max() < 1e-3


def small(**values: int) -> FinePrintConfig:
    return FinePrintConfig(**{"train_pages": 12, "val_pages": 3, **values})


def files_of(folder: Path) -> dict[str, str]:
    """All but the indexes, which know the date of their shard."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".npz")
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def test_same_values_give_the_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    first, again = (write_fine_print(small(), tmp_path / name) for name in ("a", "b"))
    assert first.name == again.name
    assert files_of(first) == files_of(again)
    other = write_fine_print(small(seed=1), tmp_path / "a")
    assert other.name != first.name
    assert files_of(other)["train/shard-000000.tar"] != files_of(first)["train/shard-000000.tar"]


def test_a_training_page_asks_for_both_and_a_validation_page_for_one_at_a_time(tmp_path: Path) -> None:
    folder = write_fine_print(small(), tmp_path)
    train, val = ShardSource(folder / "train"), ShardSource(folder / "val")
    assert (len(train), len(val)) == (12, 6)
    asked = {"coarse": COARSE_QUESTION, "fine": FINE_QUESTION}
    words = {"coarse": set(COLOURS), "fine": set(WEAVES)}
    records = [train[i] for i in range(12)]
    for record in records:
        first, _, second, answer = record.turns
        assert {first.text.removeprefix("<image>\n"), second.text} == set(asked.values())
        assert second.text == asked[record.kind]
        assert answer.text == " ".join(record.facts)
        assert len(record.facts) == 16
        assert set(record.facts) <= words[record.kind]
    assert {record.kind for record in records} == {"coarse", "fine"}
    assert [val[i].kind for i in range(6)] == ["coarse", "fine"] * 3
    assert [val[i].turns[0].text for i in range(2)] == [f"<image>\n{asked[kind]}" for kind in ("coarse", "fine")]
    assert val[0].images[0].tobytes() == val[1].images[0].tobytes()


def test_answers_name_what_is_on_the_page(tmp_path: Path) -> None:
    val = ShardSource(write_fine_print(small(), tmp_path) / "val")
    page = draw_page(Loom(small()), "val", 1)
    assert np.array_equal(np.asarray(val[2].images[0]), page.pixels)
    assert val[2].facts == tuple(list(COLOURS)[i] for i in page.colours.flat)
    assert val[3].facts == tuple(WEAVES[i] for i in page.weaves.flat)


def test_manifest_lists_values_and_every_shard(tmp_path: Path) -> None:
    folder = write_fine_print(small(), tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["values"]["train_pages"] == 12
    assert (manifest["splits"]["val"]["pages"], manifest["splits"]["val"]["samples"]) == (3, 6)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert (folder / shard["name"]).stat().st_size == shard["bytes"]
            assert file_sha256(folder / shard["name"]) == shard["sha256"]


def test_a_whole_set_is_not_written_again_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = write_fine_print(small(), tmp_path)
    before = (folder / "train/shard-000000.tar").stat().st_mtime_ns
    assert write_fine_print(small(), tmp_path) == folder
    assert (folder / "train/shard-000000.tar").stat().st_mtime_ns == before
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lost its manifest\.json\. Remove the folder"):
        write_fine_print(small(), tmp_path)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepstack_pl.data.fine_print.draw_page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_fine_print(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cells": 5}, "does not divide"),
        ({"cells": 16}, "4 pixels or more"),
        ({"cells": 0}, "does not divide"),
        ({"weaves": 5}, "use 2 to 4"),
        ({"weaves": 1}, "use 2 to 4"),
        ({"train_pages": 0}, "at least one page"),
        ({"contrast": 80}, "at most 69"),
        ({"flips": 0.7}, "a share from 0 to 0.5"),
        ({"noise": 0}, "use 1 to 8"),
        ({"seed": -1}, "count from 0"),
    ],
)
def test_values_that_break_the_set_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinePrintConfig(**values)
