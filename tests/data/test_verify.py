"""Verify: every damage of every shard, and a missing index written."""

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from replicas import encoded

from deepstack_pl.cli.main import main
from deepstack_pl.data.index import ShardIndex, sidecar
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.verify import shard_folders, verify


def write(folder: Path, samples: int = 6) -> list[Path]:
    with ShardWriter(folder, max_samples=2) as writer:
        for number in range(samples):
            writer.write({"id": str(number)}, [encoded(Image.new("RGB", (4, 4), (number, 0, 0)), "PNG")])
    return sorted(folder.glob("*.tar"))


def test_whole_shards_are_said_to_be_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train")
    write(tmp_path / "val", samples=2)
    assert main(["shards", "verify", f"root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"8 samples in 4 shards of {tmp_path}" in said
    assert "MB/s" in said
    assert said.endswith("all whole\n")


def test_a_missing_index_is_written_and_is_the_same(tmp_path: Path) -> None:
    shards = write(tmp_path)
    before = ShardIndex.load(sidecar(shards[1]))
    sidecar(shards[1]).unlink()
    found = verify(shard_folders(tmp_path))
    assert (found.damage, found.written) == ([], [sidecar(shards[1])])
    assert ShardIndex.load(sidecar(shards[1])).same_as(before)


def test_every_damage_is_listed_and_nothing_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write(tmp_path / "train", samples=12)
    date = shards[0].stat()
    data = shards[0].read_bytes()
    shards[0].write_bytes(data.replace(b'"id": "0"', b'"id": "9"'))
    os.utime(shards[0], ns=(date.st_atime_ns, date.st_mtime_ns))
    shards[1].write_bytes(data[:2048])
    shards[2].write_bytes(data[:2048] + b"\xaa" * 512 + data[2560:])
    sidecar(shards[3]).write_bytes(b"no index")
    shards[4].unlink()
    (tmp_path / "train/stray.tar").write_bytes(data)
    assert main(["shards", "verify", f"root={tmp_path}"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "shard-000003.index.npz"):
        assert any(name in line for line in lines), name
    assert any("shard-000004" in line for line in lines)
    assert f"{len(lines)} damaged" in said.out
    assert sidecar(shards[3]).read_bytes() == b"no index"


def test_a_shard_exchanged_for_another_whole_one_is_found(tmp_path: Path) -> None:
    shards = write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    shards[0].write_bytes(shards[1].read_bytes())
    (damage,) = verify(shard_folders(tmp_path)).damage
    assert "shard-000000.tar is not the shard that shard-000000.index.npz was made of" in damage


def test_an_index_that_says_something_else_of_the_same_bytes_is_found(tmp_path: Path) -> None:
    shards = write(tmp_path)
    index = ShardIndex.load(sidecar(shards[0]))
    index.columns.text[0] += 1
    index.save(sidecar(shards[0]))
    assert len(verify(shard_folders(tmp_path)).damage) == 1


def test_a_manifest_with_another_digest_and_an_unfinished_folder_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    manifest["shards"][2]["sha256"] = "0" * 64
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    write(tmp_path / "b")
    (tmp_path / "b/unfinished.partial").touch()
    first, second = verify(shard_folders(tmp_path)).damage
    assert "shard-000002.tar has sha256" in first
    assert "holds unfinished.partial" in second


@pytest.mark.parametrize("root", ["nowhere", "empty"])
def test_a_folder_without_shards_is_refused(tmp_path: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["shards", "verify", f"root={tmp_path / root}"]) == 1
    assert f"{tmp_path / root} " in capsys.readouterr().err
    assert main(["shards", "verify", "root=https://host/x"]) == 1
    assert "is remote" in capsys.readouterr().err


def test_a_shard_that_the_manifest_does_not_list_is_found(tmp_path: Path) -> None:
    shards = write(tmp_path)
    (tmp_path / "stray.tar").write_bytes(shards[0].read_bytes())
    (damage,) = verify(shard_folders(tmp_path)).damage
    assert "stray.tar is not in its manifest" in damage
    assert not sidecar(tmp_path / "stray.tar").exists()


def test_a_folder_that_cannot_be_written_to_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path)
    sidecar(shards[1]).unlink()

    def read_only(self: ShardIndex, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(ShardIndex, "save", read_only)
    found = verify(shard_folders(tmp_path))
    assert (found.damage, found.written, found.shards) == ([], [], 3)
