"""Shards behind a URL are the shards of the folder that was uploaded, or an error that says what to upload."""

import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from faulty_server import Server, serve
from PIL import Image

from deepstack_pl.data import cache as cache_module
from deepstack_pl.data import download
from deepstack_pl.data.cache import ShardCache
from deepstack_pl.data.config import DataConfig, Shuffle
from deepstack_pl.data.folders import open_folder
from deepstack_pl.data.remote import RemoteFolder, check_order, remote_folder
from deepstack_pl.data.shards import MANIFEST, ShardInfo, ShardWriter
from deepstack_pl.data.sources import ShardSource


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(cache_module, "GRACE", 0.0)
    monkeypatch.setattr(cache_module, "RESERVE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number * 10, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Seven samples in three shards, one of them text-only."""
    with ShardWriter(tmp_path / "built" / "train", max_samples=3) as writer:
        for number in range(7):
            asked = "Hello" if number == 3 else "<image>\nWhat?"
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"answer {number}"}]
            image = {} if number == 3 else {"image": f"coco/{number}.png"}
            writer.write({"id": str(number), **image, "conversations": turns}, [picture(number)] if image else [])
    return tmp_path / "built"


@pytest.fixture
def server(built: Path) -> Iterator[Server]:
    with serve({str(path.relative_to(built)): path.read_bytes() for path in built.rglob("*.*")}) as state:
        yield state


def config(tmp_path: Path, **values: object) -> DataConfig:
    return DataConfig(name="far", cache=str(tmp_path / "cache"), **values)  # pyright: ignore[reportArgumentType]


def same(one: ShardSource, other: ShardSource) -> None:
    assert len(one) == len(other)
    assert one.fingerprint == other.fingerprint
    for number in range(len(one)):
        mine, its = one[number], other[number]
        assert (mine.key, mine.turns, mine.source) == (its.key, its.turns, its.source)
        assert [image.tobytes() for image in mine.images] == [image.tobytes() for image in its.images]
        assert one.outline(number) == other.outline(number)


def test_remote_shards_are_those_of_the_folder_that_was_uploaded(built: Path, server: Server, tmp_path: Path) -> None:
    remote = ShardSource(open_folder(server.url, "train", config(tmp_path)))
    same(remote, ShardSource(built / "train"))
    assert all(count == 1 for count in server.gets.values())
    assert f"3 shards of {server.url}/train" in remote.describe()


def test_opening_fetches_no_shard_and_reading_only_the_one_that_is_read(server: Server, tmp_path: Path) -> None:
    source = ShardSource(open_folder(server.url, "train", config(tmp_path)))
    assert not [name for name in server.gets if name.endswith(".tar")]
    assert source[4].turns[-1].text == "answer 4"
    assert [name for name in server.gets if name.endswith(".tar")] == ["train/shard-000001.tar"]


def test_a_second_start_fetches_the_manifest_and_nothing_else(server: Server, tmp_path: Path) -> None:
    list(map(ShardSource(open_folder(server.url, "train", config(tmp_path))).__getitem__, range(7)))
    server.gets.clear()
    list(map(ShardSource(open_folder(server.url, "train", config(tmp_path))).__getitem__, range(7)))
    assert server.gets == {f"train/{MANIFEST}": 1}


def test_a_remote_source_travels_to_a_worker(server: Server, tmp_path: Path) -> None:
    source = ShardSource(open_folder(server.url, "train", config(tmp_path)))
    same(pickle.loads(pickle.dumps(source)), source)


def test_stores_behind_fsspec_are_folders_too(built: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in (built / "train").iterdir():
        memory.pipe(f"/{tmp_path.name}/train/{path.name}", path.read_bytes())
    remote = ShardSource(remote_folder(f"memory://{tmp_path.name}", "train", config(tmp_path)))
    same(remote, ShardSource(built / "train"))


@pytest.mark.parametrize("gone", [MANIFEST, "shard-000001.index.npz"])
def test_what_was_not_uploaded_is_named_with_the_remedy(server: Server, tmp_path: Path, gone: str) -> None:
    del server.files[f"train/{gone}"]
    with pytest.raises(ValueError, match=rf"train/{gone}: there is no such file .*shards verify .*data\.stream=webd"):
        ShardSource(open_folder(server.url, "train", config(tmp_path)))


def test_a_shard_replaced_under_its_manifest_is_refused_when_it_is_read(server: Server, tmp_path: Path) -> None:
    source = ShardSource(open_folder(server.url, "train", config(tmp_path)))
    server.files["train/shard-000001.tar"] = server.files["train/shard-000001.tar"].replace(b"answer 4", b"answer 5")
    assert source[0].turns[-1].text == "answer 0"
    with pytest.raises(ValueError, match=r"train/shard-000001\.tar: what came has sha256"):
        source[4]


def test_an_index_of_other_bytes_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    mine, its = "train/shard-000000.index.npz", "train/shard-000001.index.npz"
    right, server.files[mine] = server.files[mine], server.files[its]
    with pytest.raises(ValueError, match=r"shard-000000\.index\.npz is the index of 3 samples in \d+ bytes with"):
        ShardSource(open_folder(server.url, "train", config(tmp_path)))
    server.files[mine] = right
    assert len(ShardSource(open_folder(server.url, "train", config(tmp_path)))) == 7


def test_a_damaged_index_is_refused_and_fetched_again_when_it_is_right(server: Server, tmp_path: Path) -> None:
    name = "train/shard-000000.index.npz"
    right = server.files[name]
    server.files[name] = right[:-100]
    with pytest.raises(ValueError, match=rf"{name}.*no index of a shard"):
        ShardSource(open_folder(server.url, "train", config(tmp_path)))
    server.files[name] = right
    assert len(ShardSource(open_folder(server.url, "train", config(tmp_path)))) == 7


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"name": "../../evil.tar"}, "no plain name"),
        ({"name": "a/b.tar"}, "no plain name"),
        ({"name": "shard-000001.tar"}, "names used once"),
        ({"sha256": "../" * 21 + "a"}, "with sha256"),
        ({"bytes": "many"}, "a shard as"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_that_lists_no_plain_shards_is_refused(
    server: Server, tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    manifest = json.loads(server.files[f"train/{MANIFEST}"])
    manifest["shards"][0] |= changes
    server.files[f"train/{MANIFEST}"] = json.dumps(manifest).encode()
    with pytest.raises(ValueError, match=rf"{MANIFEST} is no manifest of shards \(.*{found}"):
        RemoteFolder(server.url, "train", ShardCache(tmp_path, 10**6))


def test_a_page_in_place_of_a_manifest_is_refused(server: Server, tmp_path: Path) -> None:
    server.files[f"train/{MANIFEST}"] = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="is no manifest of shards"):
        RemoteFolder(server.url, "train", ShardCache(tmp_path, 10**6))


def shards(count: int, samples: int, size: int) -> list[ShardInfo]:
    digest = hashlib.sha256().hexdigest()
    return [ShardInfo(f"shard-{number:06d}.tar", samples, size, digest) for number in range(count)]


def test_a_full_shuffle_of_more_than_the_cache_holds_is_refused_with_blocks_as_the_remedy(tmp_path: Path) -> None:
    many = shards(100, 5000, 250_000_000)
    told = r"100 shards of 25 GB, and a cache of data\.cache_gb=10: .*data\.shuffle=blocks data\.block=5000 data\.win"
    with pytest.raises(ValueError, match=told):
        check_order(many, config(tmp_path, cache_gb=10.0))
    check_order(many, config(tmp_path, cache_gb=25.0))


def test_what_the_refusals_advise_is_accepted(tmp_path: Path) -> None:
    many = shards(100, 5000, 250_000_000)
    check_order(many, config(tmp_path, cache_gb=1.5, shuffle=Shuffle.blocks, block=5000, window=10_000))


def test_blocks_smaller_than_a_shard_would_fetch_it_again_and_again(tmp_path: Path) -> None:
    many = shards(100, 5000, 250_000_000)
    with pytest.raises(ValueError, match=r"data\.block=128 is less than the 5000 samples of a shard"):
        check_order(many, config(tmp_path, cache_gb=10.0, shuffle=Shuffle.blocks))


def test_a_window_over_more_shards_than_the_cache_holds_is_refused(tmp_path: Path) -> None:
    many = shards(100, 5000, 250_000_000)
    with pytest.raises(ValueError, match=r"data\.window=100000 .* spans up to 42 shards, 10\.5 GB"):
        check_order(many, config(tmp_path, cache_gb=10.0, shuffle=Shuffle.blocks, block=5000, window=100_000))
