"""Sources: LLaVA's format taken strictly, pictures decoded the same everywhere, every refusal names what and where."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepstack_pl.batch import Refused, Role, Turn
from deepstack_pl.data.config import DataConfig, FinePrintConfig, MixtureEntry
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.index import sidecar
from deepstack_pl.data.shards import ShardWriter, file_sha256
from deepstack_pl.data.sources import ShardSource, open_sources
from deepstack_pl.vision import images as pictures
from deepstack_pl.vision.images import decode_image

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


def test_a_shard_edited_to_equal_length_is_refused_with_both_digests(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    before = file_sha256(shard)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"value": "4"', b'"value": "7"'))
    assert shard.stat().st_size == len(data)
    with pytest.raises(ValueError, match=r"shard-000001\.tar has sha256") as error:
        ShardSource(tmp_path)
    assert f"sha256 {file_sha256(shard)[:12]}..." in str(error.value)
    assert f"lists it with {before[:12]}..." in str(error.value)
    assert str(error.value).endswith("if you changed them on purpose, remove their .index.npz and the manifest.")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar has sha256 .* but .*shard-000001\.index\.npz lists it"):
        ShardSource(tmp_path)
    sidecar(shard).unlink()
    edited = ShardSource(tmp_path)
    assert edited[4].facts == ("7",)
    assert edited.fingerprint != first.fingerprint


@pytest.mark.parametrize("left", ["unfinished.partial", ".shard-000002.tar.partial", ".manifest.json.partial"])
def test_shards_of_an_interrupted_writer_are_refused(tmp_path: Path, left: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / left).touch()
    with pytest.raises(ValueError, match=rf"holds {left}: .*samples are missing\. Remove the folder and write"):
        ShardSource(tmp_path)
    (tmp_path / left).unlink()
    assert len(ShardSource(tmp_path)) == 5  # as foreign shards, which have no manifest


def test_an_error_after_a_whole_shard_leaves_no_source(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, max_samples=1) as writer:
            writer.write(said("<image>", "a"), [encoded(RED)])
            writer.write(said("<image>", "a"), [encoded(RED)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "shard-000000.tar").exists()
    with pytest.raises(ValueError, match=r"holds unfinished\.partial: "):
        ShardSource(tmp_path)


def test_a_manifest_that_lists_nothing_is_not_taken_for_none(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "manifest.json").write_text('{"samples": 0, "shards": []}')
    with pytest.raises(ValueError, match=r"shard-000000\.tar, shard-000001\.tar \(2 in all\) not in its manifest"):
        ShardSource(tmp_path)


def test_a_stray_shard_beside_a_manifest_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "more.tar").write_bytes((tmp_path / "shard-000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"more\.tar \(1 in all\) not in its manifest\.json"):
        ShardSource(tmp_path)


def test_members_that_are_not_read_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.json", b"{}"), ("a.png", encoded(RED)), ("a.txt", b"1"), ("a.seg.png", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = ShardSource(tmp_path)
    assert source.describe().endswith("members that are not read: 1 .seg.png, 1 .txt")
    assert source.columns.images.tolist() == [1]


def test_an_outline_has_turns_and_sizes_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, high = Image.new("RGB", (9, 4)), Image.new("RGB", (3, 7))
    with ShardWriter(tmp_path / "val") as writer:
        writer.write(said("<image> or <image>?", "The first."), [encoded(wide), encoded(high, "JPEG")])
        writer.write(said("Hello", "Hi"))
        writer.write(said("<image>", "A"), [encoded(RED)[:40]])
        writer.write(said("No placeholder", "A"), [encoded(RED)])
    source = ShardSource(tmp_path / "val")
    monkeypatch.setattr("deepstack_pl.data.sources.decode_image", None)
    outline = source.outline(0)
    assert outline.key == source.key(0) == "val/shard-000000.tar:000000000"
    assert outline.turns == (Turn(Role.user, "<image> or <image>?"), Turn(Role.assistant, "The first."))
    assert outline.sizes == ((9, 4), (3, 7))
    assert source.outline(1).sizes == ()
    for sample in (2, 3):
        with pytest.raises(Refused, match=rf"^val/shard-000000\.tar:00000000{sample}"):
            source.outline(sample)


def test_columns_say_what_every_sample_is(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples=2) as writer:
        writer.write(said("<image>", "12345", image="gqa/images/1.jpg"), [encoded(Image.new("RGB", (9, 4)))])
        writer.write(said("1", "2", "3", "4"))
        writer.write(said("<image>", "a", image="00012/1.jpg"), [encoded(RED)[:40]])
    columns = ShardSource(tmp_path, "lcs558k").columns
    assert columns.images.tolist() == [1, 0, 1]
    assert columns.text.tolist() == [12, 4, 8]
    assert list(zip(columns.width.tolist(), columns.height.tolist(), strict=True)) == [(9, 4), (0, 0), (0, 0)]
    assert [columns.sources[place] for place in columns.source] == ["gqa", "text", "lcs558k"]
    assert ShardSource(tmp_path, "lcs558k")[0].source == "gqa"
    assert all(getattr(columns, name).dtype == np.int64 for name in ("images", "text", "width", "height", "source"))


def test_open_sources_writes_fine_print_once_and_opens_it_as_shards(tmp_path: Path) -> None:
    config = DataConfig(root=str(tmp_path), fine_print=FinePrintConfig(train_pages=3, val_pages=2))
    train, val = open_sources(config)
    assert (len(train), len(val)) == (3, 4)
    (folder,) = tmp_path.iterdir()
    shards, _ = open_sources(DataConfig(source=Kind.shards, root=str(folder)))
    assert shards.fingerprint == train.fingerprint


def test_a_mixture_validates_on_its_root_or_on_its_first_set(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for split, samples in (("train", 4), ("val", 2)):
            write_shards(tmp_path / name / split, samples)
    write_shards(tmp_path / "c/val", samples=1)
    mixture = [MixtureEntry(root=str(tmp_path / name)) for name in ("a", "b")]
    train, val = open_sources(DataConfig(source=Kind.shards, mixture=mixture, root=str(tmp_path)))
    assert (len(train), len(val)) == (8, 2)
    _, val = open_sources(DataConfig(source=Kind.shards, mixture=mixture, root=str(tmp_path / "c")))
    assert len(val) == 1


def test_a_number_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    for number in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {number} of 5"):
            source[number]
