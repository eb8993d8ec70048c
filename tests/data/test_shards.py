"""Shards: standard, byte-reproducible, whole or absent; and an index that no damage gets past."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from deepstack_pl.data.shards import ShardWriter, check_finished, read_index, read_manifest

RECORD = {"id": "a", "conversations": []}


def picture(kind: str = "PNG", colour: str = "red", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, samples: int = 6, **limits: int) -> Path:
    with ShardWriter(folder, **limits) as writer:
        for number in range(samples):
            writer.write({**RECORD, "id": str(number)}, [picture()])
    return folder / "shard-000000.tar"


def test_what_is_written_is_read_back_verbatim(tmp_path: Path) -> None:
    record = b'{"z": 1,   "a": "\\u00e9"}'
    images = [picture("JPEG"), picture("WEBP"), picture("GIF")]
    with ShardWriter(tmp_path) as writer:
        writer.write(record, images)
        writer.write(RECORD, images[:1])
        writer.write(RECORD)
    data = (tmp_path / "shard-000000.tar").read_bytes()
    entries = read_index(tmp_path / "shard-000000.tar")
    assert [entry.key for entry in entries] == ["000000000", "000000001", "000000002"]
    assert [set(entry.members) for entry in entries] == [
        {"json", "0.jpg", "1.webp", "2.gif"},
        {"json", "jpg"},
        {"json"},
    ]
    found = {extension: data[start : start + size] for extension, (start, size) in entries[0].members.items()}
    assert found == {"json": record, "0.jpg": images[0], "1.webp": images[1], "2.gif": images[2]}


def test_webdataset_reads_the_shards_too(tmp_path: Path) -> None:
    shard = write(tmp_path, samples=3)
    samples = list(WebDataset(str(shard), shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == ["0", "1", "2"]
    assert samples[0]["png"] == picture()


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_shards_are_cut_by_samples_and_by_bytes_and_listed(tmp_path: Path) -> None:
    write(tmp_path / "samples", max_samples=4)
    assert [shard.samples for shard in read_manifest(tmp_path / "samples") or ()] == [4, 2]
    write(tmp_path / "bytes", max_bytes=3 * 2048)
    assert [shard.samples for shard in read_manifest(tmp_path / "bytes") or ()] == [3, 3]
    assert read_index(tmp_path / "bytes/shard-000001.tar")[0].key == "000000003"


def abort(folder: Path, whole_samples: int = 1) -> None:
    """Write shards of two samples until one is no picture."""

    def fail() -> None:
        with ShardWriter(folder, max_samples=2) as writer:
            for _ in range(whole_samples):
                writer.write(RECORD, [picture()])
            writer.write(RECORD, [b"<!DOCTYPE html><title>404</title>"])

    with pytest.raises(ValueError, match=rf"sample 00000000{whole_samples}, image 0: a web page"):
        fail()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_while_writing_leaves_no_half_shard_but_a_marker(tmp_path: Path) -> None:
    abort(tmp_path / "a", whole_samples=1)
    assert names(tmp_path / "a") == ["unfinished.partial"]
    for whole_samples in (2, 3):  # between two shards, and in the second
        abort(tmp_path / str(whole_samples), whole_samples)
        assert "unfinished.partial" in names(tmp_path / str(whole_samples))
    assert names(tmp_path / "3") == ["shard-000000.tar", "unfinished.partial"]


def test_a_set_that_is_not_finished_is_marked_from_the_start_and_unmarked_at_the_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_samples=1)
    writer.write(RECORD, [picture()])
    writer.write(RECORD, [picture()])  # killed here, it would leave this behind
    assert names(tmp_path) == [".shard-000001.tar.partial", "shard-000000.tar", "unfinished.partial"]
    with pytest.raises(ValueError, match="still being written, or that was interrupted"):
        check_finished(tmp_path)
    writer.close()
    check_finished(tmp_path)
    assert names(tmp_path) == ["manifest.json", "shard-000000.tar", "shard-000001.tar"]


def test_writing_again_after_an_error_in_the_first_shard_gives_a_whole_set(tmp_path: Path) -> None:
    abort(tmp_path)
    (tmp_path / ".shard-000001.tar.partial").write_bytes(b"of a killed writer")
    write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "shard-000000.tar"]


def test_writing_over_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="holds shards already"):
        ShardWriter(tmp_path)


def test_a_lost_or_changed_shard_is_noticed(tmp_path: Path) -> None:
    shard = write(tmp_path, max_samples=4)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"shard-000000\.tar has \d+ bytes, but"):
        read_manifest(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.tar is not there, but"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"shards": 3}', '{"shards": ["shard-000000.tar"]}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of shards .*Remove it"):
        read_manifest(tmp_path)


def test_a_manifest_whose_digest_is_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="sha256 None: both are text"):
        read_manifest(tmp_path)


# A sample of `write` is two members of two blocks each: 2048 bytes.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "no archive": lambda data: b"<html>" + bytes(1018),
    "cut in a block": lambda data: data[:5000],
    "cut in a header": lambda data: data[: 2048 + 100],
    "cut between samples": lambda data: data[: 3 * 2048],
    "cut between header and data": lambda data: data[: 3 * 2048 + 512],
    "one block of the end marker": lambda data: data[: 6 * 2048 + 512],
    "zeros in the middle": lambda data: data[:4096] + bytes(2048) + data[3 * 2048 :],
    "garbage header": lambda data: data[:4096] + b"\xaa" * 512 + data[4096 + 512 :],
    "one bit of a header": lambda data: data[:4098] + bytes([data[4098] ^ 1]) + data[4099:],
    "two archives in one": lambda data: data + data,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = write(tmp_path)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-000000\.tar: .*(again|like)"):
        read_index(shard)


def craft(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("a.json", b"{}"), ("b.json", b"{}"), ("a.png", b"1")), "a.png is apart from the other members of sample a"),
        ((("a.json", b"{}"), ("a.json", b"{}")), "a.json is there twice"),
        ((("a.JPG", b"1"), ("a.jpg", b"1"), ("a.json", b"{}")), "a.jpg is there twice"),
        ((("a.json", b"{}"), ("../b.json", b"{}")), r"\.\./b.json leaves"),
        ((("/a.json", b"{}"),), "/a.json leaves"),
        ((link("a.json", tarfile.SYMTYPE),), "a.json is a link"),
        ((("b.json", b"{}"), link("a.json", tarfile.LNKTYPE)), "a.json is a link"),
        ((link("a.json", tarfile.FIFOTYPE),), "a device"),
        ((("a.json", b"{}"), ("b.png", b"1")), r"member b has no json \(only png\)"),
        ((("README", b"x"),), "README is not named KEY.EXTENSION"),
    ],
)
def test_members_that_readers_stumble_over_are_refused(tmp_path: Path, members: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_index(craft(tmp_path / "x.tar", *members))


def test_folders_and_dot_slash_names_as_tar_writes_them_are_read(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./part")
    folder.type = tarfile.DIRTYPE
    shard = craft(tmp_path / "x.tar", folder, ("./part/a.json", b"{}"), ("./part/a.seg.png", b"1"))
    assert [(entry.key, list(entry.members)) for entry in read_index(shard)] == [("part/a", ["json", "seg.png"])]
