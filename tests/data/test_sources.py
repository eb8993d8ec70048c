"""Sources: LLaVA's format taken strictly, pictures decoded the same everywhere, every refusal names what and where."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepstack_pl.batch import Role, Turn
from deepstack_pl.data import images as pictures
from deepstack_pl.data.config import DataConfig, FinePrintConfig
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.images import decode_image
from deepstack_pl.data.llava import record_from_llava
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.sources import LlavaJsonSource, ShardSource, open_sources

RED = Image.new("RGB", (4, 4), "red")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def said(*turns: str, **more: object) -> dict:
    """A record whose turns alternate, the user first."""
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "x", "conversations": conversation, **more}


def test_a_record_keeps_turns_images_kind_and_facts() -> None:
    values = said("<image>\nWhat?", "a b", kind="fine", facts=["a", "b"])
    record = record_from_llava(values, [RED], "k")
    assert record.turns == (Turn(Role.user, "<image>\nWhat?"), Turn(Role.assistant, "a b"))
    assert (record.key, record.kind, record.facts, record.images) == ("k", "fine", ("a", "b"), (RED,))


def test_without_facts_the_last_answer_is_the_fact() -> None:
    record = record_from_llava(said("Hello", "Hi", "And?", "Well."), [], "k")
    assert (record.kind, record.facts) == ("answer", ("Well.",))


def test_a_leading_answer_is_dropped() -> None:
    values = said("Hello", "Hi")
    values["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    assert [turn.text for turn in record_from_llava(values, [], "k").turns] == ["Hello", "Hi"]


@pytest.mark.parametrize(
    ("values", "images", "message"),
    [
        (said("<image><image>", "a"), 1, r"^k: 2 <image> placeholders in the text, but 1 images\. Write one"),
        (said("What?", "a"), 1, "0 <image> placeholders in the text, but 1 images"),
        (said("What is <image>?", "a"), 0, "1 <image> placeholders in the text, but 0 images"),
        (said(), 0, "an empty conversation"),
        (said("What?"), 0, "last answer is missing"),
        (said("What?", "a", "And?"), 0, "last answer is missing"),
        (said("What?", "  "), 0, "last answer is missing"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, 0, "an empty conversation"),
        ({"conversations": said("a")["conversations"] * 2}, 0, "two turns in a row"),
        ({"conversations": [{"from": "system", "value": "a"}]}, 0, "turn 0 is from 'system'"),
        ({"conversations": [{"from": "human", "value": 3}]}, 0, "turn 0 has no text"),
        ({"text": "a"}, 0, "no list of"),
        ([], 0, "no list of"),
        (said("What?", "a", facts="a"), 0, "a list of strings"),
    ],
)
def test_a_malformed_record_is_refused_by_key(values: dict, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from_llava(values, [RED] * images, "k")


def test_transparency_becomes_white_and_sixteen_bits_keep_their_range() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    assert list(decode_image(encoded(clear), "k").get_flattened_data()) == [(255, 0, 0), (255, 255, 255)]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert list(decode_image(encoded(deep), "k").get_flattened_data()) == [(0,) * 3, (128,) * 3, (255,) * 3]
    for mode in ("L", "P", "CMYK", "1"):
        decoded = decode_image(encoded(RED.convert(mode), "TIFF"), "k")
        assert (decoded.mode, decoded.size) == ("RGB", (4, 4))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html>", "a web page instead of a picture"),
        (b"GARBAGE", "7 bytes that are no picture, starting with b'GARBAGE'"),
        (encoded(Image.effect_noise((64, 64), 9).convert("RGB"))[:900], "900 bytes of a png image that is cut off"),
        (encoded(Image.effect_noise((64, 64), 9), "JPEG")[:900], "900 bytes of a jpg image that is cut off"),
    ],
)
def test_an_unreadable_image_in_a_shard_names_shard_key_and_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, found: str
) -> None:
    monkeypatch.setattr("deepstack_pl.data.shards.sniff", lambda data: "png")  # the writer would refuse some
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(said("<image>", "a"), [encoded(RED)])
        writer.write(said("<image>", "a"), [data])
    source = ShardSource(tmp_path / "train")
    assert source[0].images[0].tobytes() == RED.tobytes()
    with pytest.raises(ValueError, match="cannot read this image") as error:
        source[1]
    assert str(error.value).startswith(f"train/shard-000000.tar:000000001.png: cannot read this image: found {found}")
    assert str(error.value).endswith("Fetch it again, or leave its record out.")


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 15)
    data = encoded(RED)[:60]  # a header alone: decoding it would fail
    with pytest.raises(ValueError, match=r"k: an image of 4 x 4 pixels; at most 15 are decoded\. Scale"):
        decode_image(data, "k")


def write_shards(folder: Path, samples: int = 5) -> ShardSource:
    with ShardWriter(folder, max_samples=3) as writer:
        for number in range(samples):
            colour = Image.new("RGB", (4, 4), (number, 0, 0))
            writer.write(said("<image>", str(number)), [encoded(colour)])
    return ShardSource(folder)


def test_shards_are_read_in_any_order_also_by_a_pickled_copy(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "train")
    assert len(source) == 5
    source[0]
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for number in (4, 0, 3, 1):
            record = reader[number]
            assert record.facts == (str(number),)
            assert record.images[0].getpixel((0, 0)) == (number, 0, 0)
    assert source[4].key == "train/shard-000001.tar:000000004"
    assert "5 samples in 2 shards" in source.describe()


def test_several_images_of_a_sample_come_in_their_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        colours = [(number, 0, 0) for number in range(12)]
        writer.write(said("<image>" * 12, "a"), [encoded(Image.new("RGB", (2, 2), colour)) for colour in colours])
    assert [image.getpixel((0, 0)) for image in ShardSource(tmp_path)[0].images] == colours


def test_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert write_shards(tmp_path / "c", samples=6).fingerprint != first.fingerprint
    (tmp_path / "b/manifest.json").unlink()
    assert ShardSource(tmp_path / "b").fingerprint == first.fingerprint


def test_a_stray_shard_beside_a_manifest_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "more.tar").write_bytes((tmp_path / "shard-000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"more\.tar \(1 in all\) not in its manifest\.json"):
        ShardSource(tmp_path)


def test_members_that_are_not_read_are_counted(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    source._entries[0][1].members["txt"] = (0, 0)
    assert source.describe().endswith("members that are not read: 1 .txt")


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
        (said("<image><image>", "a", image="a.png"), r"my\.json:1: 2 <image> placeholders in the text, but 1 images"),
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
    refused(r"a\.png is no JSON", path=str(tmp_path / "images/a.png"))
    (tmp_path / "empty.json").write_text("[]")
    refused(r"is not a list of records, at least one", path=str(tmp_path / "empty.json"))
    refused(r"train is not there\. .*<data\.root>/train/\*\.tar", source=Kind.shards, root=str(tmp_path / "nowhere"))
    (tmp_path / "hollow/train").mkdir(parents=True)
    refused(r"train holds no \*\.tar shards", source=Kind.shards, root=str(tmp_path / "hollow"))


def test_open_sources_writes_fine_print_once_and_opens_it_as_shards(tmp_path: Path) -> None:
    config = DataConfig(root=str(tmp_path), fine_print=FinePrintConfig(train_pages=3, val_pages=2))
    train, val = open_sources(config)
    assert (len(train), len(val)) == (3, 4)
    (folder,) = tmp_path.iterdir()
    shards, _ = open_sources(DataConfig(source=Kind.shards, root=str(folder)))
    assert shards.fingerprint == train.fingerprint
