"""LLaVA's JSON file: checked when it is opened, parted by image, known by the bytes of all that it names."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from deepstack_pl.batch import Refused
from deepstack_pl.data.config import DataConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.llava_json import LlavaJsonSource, hold_out, sharing_groups
from deepstack_pl.data.sources import open_sources

RED = Image.new("RGB", (4, 4), "red")


def said(*turns: str, **more: object) -> dict:
    """A record whose turns alternate, the user first."""
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "x", "conversations": conversation, **more}


def write_json(folder: Path, records: list[dict]) -> DataConfig:
    (folder / "images/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg"):
        RED.save(folder / "images" / name)
    (folder / "my.json").write_text(json.dumps(records), encoding="utf-8-sig")
    return DataConfig(source=Kind.llava_json, path=str(folder / "my.json"), images=str(folder / "images"))


def test_llava_json_reads_one_image_several_and_none(tmp_path: Path) -> None:
    config = write_json(
        tmp_path,
        [
            said("<image>\nWhat?", "a", image="a.png"),
            said("<image> or <image>?", "b", image=["sub/b.jpg", "a.png"]),
            said("Hello", "Hi", model="x"),
            said("Hello", "Ho", image=None),
        ],
    )
    assert config.path is not None
    source = LlavaJsonSource(Path(config.path), tmp_path / "images")
    assert [len(source[i].images) for i in range(4)] == [1, 2, 0, 0]
    assert source[1].key == "my.json:1"
    assert "4 of 4 records" in source.describe()
    assert "2 without an image" in source.describe()


@pytest.mark.parametrize(("records", "val_samples", "held_out"), [(20, 5, 5), (9, 5, 1), (10, 256, 2), (2, 256, 1)])
def test_llava_json_holds_out_the_same_records_every_time(
    tmp_path: Path, records: int, val_samples: int, held_out: int
) -> None:
    config = write_json(tmp_path, [said("Count", str(number)) for number in range(records)])
    config.val_samples = val_samples
    (train, val), (again, _) = open_sources(config), open_sources(config)
    assert len(val) == held_out
    facts = [source[i].facts[0] for source in (train, val) for i in range(len(source))]
    assert sorted(facts, key=int) == [str(number) for number in range(records)]
    assert train.fingerprint == again.fingerprint
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (said("<image>", "a", image="gone.png"), r"1 of 1 images of .*my\.json are not under .*gone\.png \(record 1\)"),
        (said("<image>", "a", image="../my.json"), r"my\.json:1: image \.\./my\.json leaves the image folder"),
        (said("<image>", "a", image="/etc/passwd"), "leaves the image folder"),
        (said("<image>", "a", image=7), "image is 7"),
        (said("<image>", "a", "<image>", "b", image="a.png"), r"my\.json:1: 2 <image> placeholders in the text, but 1"),
        (said("Hello", "Hi", score=float("nan")), r"my\.json:1: holds NaN, which is no JSON"),
    ],
)
def test_llava_json_is_checked_when_it_is_opened(tmp_path: Path, record: dict, message: str) -> None:
    config = write_json(tmp_path, [said("Hello", "Hi"), record])
    with pytest.raises(ValueError, match=message):
        open_sources(config)


def test_an_unreadable_image_of_llava_json_names_record_and_file(tmp_path: Path) -> None:
    config = write_json(tmp_path, [said("<image>", "a", image="a.png"), said("Hello", "Hi")])
    (tmp_path / "images/a.png").write_bytes(b"")
    assert config.path is not None
    with pytest.raises(ValueError, match=r"my\.json:0, .*a\.png: cannot read this image: found an empty file"):
        LlavaJsonSource(Path(config.path), tmp_path / "images")[0]


def test_a_gif_named_jpg_is_the_gif_and_a_page_or_nothing_named_jpg_is_refused_by_name(tmp_path: Path) -> None:
    names = ("gif.jpg", "page.jpg", "empty.jpg", "cut.jpg")
    config = write_json(tmp_path, [said("<image>\nWhat?", "a", image=name) for name in names])
    assert config.path is not None
    folder = tmp_path / "images"
    RED.save(folder / "gif.jpg", "GIF")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes((folder / "sub/b.jpg").read_bytes()[:-30])
    source = LlavaJsonSource(Path(config.path), folder)
    assert source[0].images[0].convert("RGB").tobytes() == RED.tobytes()
    for place, name in enumerate(names[1:], 1):
        with pytest.raises(Refused, match=rf"my\.json:{place}.*{name}"):
            source[place]


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path) -> None:
    config = write_json(tmp_path, [said("<image>", "a", image="a.png")])

    def refused(message: str, **values: object) -> None:
        base = {"source": Kind.llava_json, "path": config.path, "images": config.images}
        with pytest.raises(ValueError, match=message):
            open_sources(DataConfig(**{**base, **values}))  # pyright: ignore[reportArgumentType]

    refused("holds one record")
    refused(r"say data\.path=FILE\.json", path=None)
    refused(r"nowhere\.json is not there", path=str(tmp_path / "nowhere.json"))
    refused(r"data\.images=.*nowhere is no folder", images=str(tmp_path / "nowhere"))
    refused(r"Say data\.images=FOLDER", images=None)
    refused(r"a\.png is not a list of records, at least one: it is not UTF-8", path=str(tmp_path / "images/a.png"))
    (tmp_path / "empty.json").write_text("[]")
    refused(r"is not a list of records, at least one", path=str(tmp_path / "empty.json"))
    refused(r"train is not there\. .*<data\.root>/train/\*\.tar", source=Kind.shards, root=str(tmp_path / "nowhere"))
    (tmp_path / "hollow/train").mkdir(parents=True)
    refused(r"train holds no \*\.tar shards", source=Kind.shards, root=str(tmp_path / "hollow"))


def shared(tmp_path: Path) -> DataConfig:
    """20 records over six images: 0 and 1 are shown together once, 5 is written in two ways; two records are text."""
    shown = ["0", "0", "0", "1", "1", "01", "2", "2", "2", "2", "3", "3", "4", "4", "4", "4", "5", "5", "", ""]
    records = [
        said("<image>" * len(images) + f"What? {row}", "a", image=[f"{image}.png" for image in images])
        for row, images in enumerate(shown)
    ]
    records[16]["image"] = "./5.png"
    config = write_json(tmp_path, records)
    for image in range(6):
        Image.new("RGB", (4, 4), (image, 0, 0)).save(tmp_path / f"images/{image}.png")
    return config


def opened(config: DataConfig) -> tuple[LlavaJsonSource, LlavaJsonSource]:
    train, val = open_sources(config)
    assert isinstance(train, LlavaJsonSource)
    assert isinstance(val, LlavaJsonSource)
    return train, val


@pytest.mark.parametrize("val_samples", [1, 2, 4, 7, 10])
def test_no_image_is_in_training_and_in_validation(tmp_path: Path, val_samples: int) -> None:
    config = shared(tmp_path)
    config.val_samples = val_samples
    train, val = opened(config)
    assert sorted([*train.rows, *val.rows]) == list(range(20))
    colours = [{image.getpixel((0, 0)) for i in range(len(part)) for image in part[i].images} for part in (train, val)]
    assert not colours[0] & colours[1]
    assert max(1, val_samples - 1) <= len(val) <= val_samples
    assert opened(config)[1].rows == val.rows


def test_rows_hang_together_through_other_rows_and_text_alone(tmp_path: Path) -> None:
    names = [["a"], ["b"], [], ["c"], ["b", "c"], [], ["d"], ["a", "a"]]
    assert sharing_groups(names) == [[0, 7], [1, 3, 4], [2], [5], [6]]


@pytest.mark.parametrize(
    ("sizes", "val_samples", "held_out"),
    [
        ([50, 1, 1, 1, 1, 1, 1], 5, {5}),  # the large group fits nowhere but in training
        ([5] * 8, 10, {10}),
        ([5] * 8, 12, {10}),
        ([6, 4, 7], 2, {4}),  # none fits: the smallest
        ([40, 40], 256, {40}),
    ],
)
def test_validation_is_given_whole_groups_up_to_its_size(sizes: Sequence[int], val_samples: int, held_out: set) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    train, val = hold_out(groups, val_samples)
    assert len(val) in held_out
    assert sorted(train + val) == list(range(sum(sizes)))
    assert all(set(group) <= set(val) or not set(group) & set(val) for group in groups)


def test_records_that_all_share_an_image_cannot_be_parted(tmp_path: Path) -> None:
    config = write_json(tmp_path, [said("<image>", "a", image="a.png"), said("<image>", "b", image="a.png")])
    with pytest.raises(ValueError, match=r"2 records all hang together .*Add records about other images"):
        open_sources(config)


def test_an_image_replaced_by_one_of_equal_size_and_date_changes_its_own_fingerprint_alone(tmp_path: Path) -> None:
    config = shared(tmp_path)
    config.val_samples = 7
    before = [source.fingerprint for source in opened(config)]
    assert [source.fingerprint for source in opened(config)] == before
    held_out = opened(config)[1]
    image = next(name for row in held_out.rows for name in held_out.names[row])
    file = tmp_path / "images" / image
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = [source.fingerprint for source in opened(config)]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert held_out.fingerprint == before[1]  # of the images as they were when the file was opened


def test_fingerprint_of_llava_json_does_not_change_with_its_place_or_dates(tmp_path: Path) -> None:
    first, second = shared(tmp_path / "a"), shared(tmp_path / "b")
    os.utime(tmp_path / "b/images/0.png", ns=(0, 0))
    assert [source.fingerprint for source in opened(first)] == [source.fingerprint for source in opened(second)]


def test_an_edited_answer_changes_the_fingerprint(tmp_path: Path) -> None:
    config = shared(tmp_path)
    before = opened(config)[0].fingerprint
    file = tmp_path / "my.json"
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"', 1))
    assert opened(config)[0].fingerprint != before


def test_columns_and_outlines_of_llava_json_are_those_of_its_rows(tmp_path: Path) -> None:
    config = write_json(
        tmp_path,
        [
            said("<image>\nWhat?", "a", image="sub/b.jpg"),
            said("<image> or <image>?", "b", image=["a.png", "sub/b.jpg"]),
            said("Hello", "Hi", model=""),
        ],
    )
    Image.new("RGB", (7, 3)).save(tmp_path / "images/sub/b.jpg")
    assert config.path is not None
    source = LlavaJsonSource(Path(config.path), tmp_path / "images").subset([2, 0, 1])
    columns = source.columns
    assert columns.images.tolist() == [0, 1, 2]
    assert columns.text.tolist() == [7, 14, 20]
    assert list(zip(columns.width.tolist(), columns.height.tolist(), strict=True)) == [(0, 0), (7, 3), (4, 4)]
    assert [columns.sources[place] for place in columns.source] == ["text", "sub", ""]
    assert [source[i].source for i in range(3)] == ["text", "sub", ""]
    assert source.outline(2).sizes == ((4, 4), (7, 3))
    assert source.outline(2).key == source.key(2) == "my.json:1"
