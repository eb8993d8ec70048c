"""Shards: standard, byte-reproducible, whole or absent."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from deepstack_pl.data.index import ShardIndex, build_index, sidecar
from deepstack_pl.data.shards import ShardWriter, check_finished, read_manifest

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
    index = ShardIndex.load(tmp_path / "shard-000000.index.npz")
    assert [index.key(sample) for sample in range(3)] == ["000000000", "000000001", "000000002"]
    assert [set(index.members(sample)) for sample in range(3)] == [
        {"json", "0.jpg", "1.webp", "2.gif"},
        {"json", "jpg"},
        {"json"},
    ]
    places = {extension: (int(index.offset[m]), int(index.size[m])) for extension, m in index.members(0).items()}
    found = {extension: data[start : start + size] for extension, (start, size) in places.items()}
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
    assert build_index(tmp_path / "bytes/shard-000001.tar").key(0) == "000000003"


def test_the_index_beside_a_shard_is_the_one_that_its_bytes_give(tmp_path: Path) -> None:
    shard = write(tmp_path)
    written = ShardIndex.load(sidecar(shard))
    assert written.same_as(build_index(shard))
    assert (written.name, written.mtime_ns) == (shard.name, shard.stat().st_mtime_ns)


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
    assert names(tmp_path / "3") == ["shard-000000.index.npz", "shard-000000.tar", "unfinished.partial"]


def test_a_set_that_is_not_finished_is_marked_from_the_start_and_unmarked_at_the_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_samples=1)
    writer.write(RECORD, [picture()])
    writer.write(RECORD, [picture()])  # killed here, it would leave this behind
    half = [".shard-000001.tar.partial", "shard-000000.index.npz", "shard-000000.tar", "unfinished.partial"]
    assert names(tmp_path) == half
    with pytest.raises(ValueError, match="still being written, or that was interrupted"):
        check_finished(tmp_path)
    writer.close()
    check_finished(tmp_path)
    assert [name for name in names(tmp_path) if "index" not in name] == [
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


def test_writing_again_after_an_error_in_the_first_shard_gives_a_whole_set(tmp_path: Path) -> None:
    abort(tmp_path)
    (tmp_path / ".shard-000001.tar.partial").write_bytes(b"of a killed writer")
    write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "shard-000000.index.npz", "shard-000000.tar"]


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
