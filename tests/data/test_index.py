"""The index: no damage gets past it, nothing in it costs an object a sample, and what is trusted was proved."""

import gc
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.data import index as index_module
from deepstack_pl.data.columns import Columns
from deepstack_pl.data.folders import LocalFolder
from deepstack_pl.data.index import INDEX_VERSION, ShardIndex, build_index, sidecar
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.sources import ShardSource

RECORD = {"id": "a", "conversations": []}


def picture(colour: str = "red", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, samples: int = 6) -> Path:
    with ShardWriter(folder) as writer:
        for number in range(samples):
            writer.write({**RECORD, "id": str(number)}, [picture()])
    return folder / "shard-000000.tar"


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


def test_an_index_is_stored_and_read_back_whole(tmp_path: Path) -> None:
    shard = craft(
        tmp_path / "x.tar", ("a/ü.json", b'{"image": "coco/1.png"}'), ("a/ü.png", picture()), ("b.json", b"{}")
    )
    index = build_index(shard)
    index.save(sidecar(shard))
    again = ShardIndex.load(sidecar(shard))
    assert again.same_as(index)
    assert [again.key(0), again.key(1)] == ["a/ü", "b"]
    assert again.columns.sources == ("coco", "text")
    assert (again.columns.width.tolist(), again.columns.images.tolist()) == ([8, 0], [1, 0])
    assert not replace(index, crc=index.crc + np.uint32(1)).same_as(again)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: b"PK" + data[:-30]])
def test_an_index_that_is_none_is_refused_with_the_remedy(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = sidecar(write(tmp_path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-000000\.index\.npz is no index of a shard .*Remove it"):
        LocalFolder(tmp_path).shards()


def test_an_index_whose_arrays_do_not_go_together_is_refused(tmp_path: Path) -> None:
    path = sidecar(write(tmp_path))
    index = ShardIndex.load(path)
    replace(index, crc=index.crc[1:]).save(path)
    with pytest.raises(ValueError, match="its arrays differ in length"):
        ShardIndex.load(path)


def test_nothing_is_executed_by_an_index(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.index.npz", told=np.array([print], object))
    with pytest.raises(ValueError, match=r"x\.index\.npz is no index"):
        ShardIndex.load(tmp_path / "x.index.npz")


def test_a_shard_of_known_size_and_date_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path)
    monkeypatch.setattr("deepstack_pl.data.folders.build_index", None)
    monkeypatch.setattr("deepstack_pl.data.folders._hash_again", None)
    assert len(LocalFolder(tmp_path).shards()[0]) == 6
    os.utime(shard)
    with pytest.raises(TypeError):
        LocalFolder(tmp_path).shards()


def test_a_shard_of_another_date_is_hashed_once_and_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path)
    os.utime(shard, ns=(0, 12345))
    before = ShardSource(tmp_path).fingerprint
    assert ShardIndex.load(sidecar(shard)).mtime_ns == 12345
    monkeypatch.setattr("deepstack_pl.data.folders._hash_again", None)
    assert ShardSource(tmp_path).fingerprint == before


def test_a_shard_without_an_index_is_given_one(tmp_path: Path) -> None:
    shard = write(tmp_path)
    index = ShardIndex.load(sidecar(shard))
    sidecar(shard).unlink()
    assert LocalFolder(tmp_path).shards()[0].same_as(index)
    assert ShardIndex.load(sidecar(shard)).same_as(index)


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar(write(tmp_path)).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("deepstack_pl.data.index.tempfile.NamedTemporaryFile", refuse)
    assert len(ShardSource(tmp_path)) == 6
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("cut", [512, -512])
def test_a_shard_of_another_size_than_its_index_is_refused(tmp_path: Path, cut: int) -> None:
    shard = write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    data = shard.read_bytes() + bytes(512)
    shard.write_bytes(data[: len(data) - 512 + cut])
    with pytest.raises(ValueError, match=r"shard-000000\.tar has \d+ bytes, but shard-000000\.index\.npz is the index"):
        LocalFolder(tmp_path).shards()


def test_a_manifest_that_counts_other_samples_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds 6 samples, but its manifest\.json says 7"):
        LocalFolder(tmp_path).shards()


def test_a_bit_that_flips_on_the_disk_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        for _ in range(2):
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
            writer.write({"conversations": turns}, [picture()])
    shard = tmp_path / "train/shard-000000.tar"
    index = ShardIndex.load(sidecar(shard))
    data, date = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    for member in index.members(1).values():
        data[int(index.offset[member]) + 3] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(date, date))  # as a disk that decays leaves it
    source = ShardSource(tmp_path / "train")
    assert source[0].facts == ("a",)
    for read in (source.__getitem__, source.outline):
        with pytest.raises(
            Refused, match=r"^train/shard-000000\.tar:000000001\.json: its bytes are not those"
        ) as error:
            read(1)
        assert error.value.reason is Reason.changed


def test_columns_of_several_shards_agree_on_their_sources() -> None:
    first, second = Columns.plain(2), Columns.plain(3)
    second = replace(second, source=np.array([0, 1, 0]), sources=("coco", ""))
    both = Columns.concatenate([first, second])
    assert [both.sources[place] for place in both.source] == ["", "", "coco", "", "coco"]
    assert [both.sources[place] for place in both.take(np.array([4, 0])).source] == ["coco", ""]
    assert len(Columns.concatenate([])) == 0


@pytest.mark.slow
def test_a_million_samples_open_without_an_object_a_sample(tmp_path: Path) -> None:
    samples, shards = 20_000, 50
    shard = write(tmp_path / "one", samples=1)
    one = ShardIndex.load(sidecar(shard))
    members = np.arange(2 * samples)
    keys = b"".join(b"%09d" % number for number in range(samples))
    many = replace(
        one,
        offset=members * 1024,
        size=np.full(2 * samples, 300),
        crc=np.zeros(2 * samples, np.uint32),
        extension=(members % 2).astype(np.uint16),
        width=np.full(2 * samples, 336, np.int32),
        height=np.full(2 * samples, 336, np.int32),
        first=np.arange(samples + 1) * 2,
        key_ends=np.arange(1, samples + 1) * 9,
        key_bytes=np.frombuffer(keys, np.uint8),
        columns=Columns.plain(samples),
    )
    for number in range(shards):
        tar = tmp_path / f"all/train/shard-{number:06d}.tar"
        tar.parent.mkdir(parents=True, exist_ok=True)
        tar.touch()
        os.truncate(tar, 2 * samples * 1024)
        replace(many, bytes=2 * samples * 1024, mtime_ns=tar.stat().st_mtime_ns, name=tar.name).save(sidecar(tar))
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    source = ShardSource(tmp_path / "all/train")  # how long that takes: experiments/benchmarks/index.py
    held, blocks = (
        tracemalloc.get_traced_memory()[0],
        sum(one.count for one in tracemalloc.take_snapshot().statistics("filename")),
    )
    tracemalloc.stop()
    assert len(source) == 1_000_000
    assert len(gc.get_objects()) - before < 10_000
    assert blocks < 50_000, "arrays, and some objects for each of fifty shards"
    assert held < 300e6
    assert source.key(999_999) == "train/shard-000049.tar:000019999"
    assert source.key(20_000) == "train/shard-000001.tar:000000000"


def edited(path: Path, change: Callable[[dict[str, np.ndarray]], object], save: Callable[..., None] = np.savez) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    change(arrays)
    save(path, **arrays)


def retold(**values: object) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        text = json.dumps({**json.loads(arrays["told"].tobytes()), **values}).encode()
        arrays["told"] = np.frombuffer(text, np.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a["offset"].__setitem__(3, -5), "a member outside of the shard"),
        (lambda a: a["size"].__setitem__(3, -5), "a member outside of the shard"),
        (lambda a: a["size"].__setitem__(3, 2**62), "a member outside of the shard"),
        (lambda a: a["extension"].__setitem__(3, 500), "an extension without a name"),
        (retold(extensions=["xxx", "png"]), "an extension without a name"),
        (retold(extensions=[1, 2]), "names that are no text"),
        (lambda a: a["first"].__setitem__(2, 0), "samples out of order"),
        (lambda a: a.update(first=a["first"].astype(float)), "arrays of other kinds"),
        (lambda a: a["key_ends"].__setitem__(3, 10**9), "keys out of order"),
        (lambda a: a["key_bytes"].fill(255), "keys that are not UTF-8"),
        (lambda a: a["column_source"].__setitem__(3, -1), "a source without a name"),
        (lambda a: a["column_source"].__setitem__(3, 99), "a source without a name"),
        (lambda a: a.update(column_text=a["column_text"].reshape(-1, 1)), "arrays of other kinds"),
        (lambda a: a["extension"].fill(0), "a sample without a record"),
        (lambda a: a.update(told=np.frombuffer(b"[" * 100_000, np.uint8)), "is no index"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused_before_it_is_read_through(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], says: str
) -> None:
    path = sidecar(write(tmp_path))
    edited(path, change)
    with pytest.raises(ValueError, match=says):
        ShardSource(tmp_path)


def test_an_index_that_would_unfold_is_refused(tmp_path: Path) -> None:
    path = sidecar(write(tmp_path))
    edited(path, lambda arrays: None, np.savez_compressed)
    with pytest.raises(ValueError, match="it is compressed"):
        ShardSource(tmp_path)


def test_an_index_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = sidecar(write(tmp_path))
    monkeypatch.setattr(index_module, "INDEX_VERSION", INDEX_VERSION + 1)
    with pytest.raises(ValueError, match=rf"version {INDEX_VERSION}, not {INDEX_VERSION + 1}"):
        ShardIndex.load(index)


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    shard = write(tmp_path, samples=2500)  # so that there is something to be told of on the way
    with pytest.raises(ValueError, match="changed while it was read"):
        build_index(shard, lambda done: os.utime(shard, ns=(1, 1)))


def test_width_and_height_are_those_of_the_first_image(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(RECORD, [picture(side=side) for side in (5, 6, 7)])
        writer.write(RECORD)
    columns = build_index(tmp_path / "shard-000000.tar").columns
    assert (columns.images.tolist(), columns.width.tolist(), columns.height.tolist()) == ([3, 0], [5, 0], [5, 0])
