"""The cache of remote shards: what is kept is whole and right, and several processes share it."""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import Server, serve

from deepstack_pl.data import cache as cache_module
from deepstack_pl.data import download
from deepstack_pl.data.cache import ShardCache
from deepstack_pl.data.download import NotThere, Unreachable

SHARD = bytes(range(256)) * 400
DIGEST = hashlib.sha256(SHARD).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(cache_module, "GRACE", 0.0)
    monkeypatch.setattr(cache_module, "RESERVE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve({"a.tar": SHARD, "b.tar": SHARD[::-1], "c.tar": SHARD[:-512]}) as state:
        yield state


def fetch(cache: ShardCache, server: Server, name: str = "a.tar") -> Path:
    data = server.files[name]
    return cache.fetch(f"{server.url}/{name}", hashlib.sha256(data).hexdigest(), len(data))


def names(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir() if path.name != "lock"}


def test_a_shard_is_fetched_once_and_is_the_one_on_the_server(tmp_path: Path, server: Server) -> None:
    first = fetch(ShardCache(tmp_path / "new" / "cache", 10**6), server)
    second = fetch(ShardCache(tmp_path / "new" / "cache", 10**6), server)
    assert first == second
    assert first.read_bytes() == SHARD
    assert server.gets == {"a.tar": 1}
    assert names(first.parent) == {".kept"}


def test_a_missing_shard_is_named_and_not_asked_for_again(tmp_path: Path, server: Server) -> None:
    with pytest.raises(NotThere, match=r"/none\.tar: there is no such file .* Correct the address"):
        ShardCache(tmp_path, 10**6).fetch(f"{server.url}/none.tar", DIGEST, len(SHARD))
    assert server.gets == {"none.tar": 1}
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("busy", "the server answered 503"),
        ("short", "a.tar: "),
        ("closed", "ended at byte 51,200 of 102,400"),
    ],
)
def test_what_never_comes_right_is_named_and_nothing_is_kept(
    tmp_path: Path, server: Server, fault: str, found: str
) -> None:
    server.faults["a.tar"] = [fault]
    with pytest.raises(Unreachable, match=found) as raised:
        fetch(ShardCache(tmp_path, 10**6), server)
    assert f"{server.url}/a.tar" in str(raised.value)
    assert server.gets["a.tar"] >= download.TRIES
    assert names(tmp_path) == set()


def test_a_server_that_refuses_is_not_asked_again(tmp_path: Path, server: Server) -> None:
    server.faults["a.tar"] = ["forbidden"]
    with pytest.raises(Unreachable, match="answered 403"):
        fetch(ShardCache(tmp_path, 10**6), server)
    assert server.gets["a.tar"] == 1


def test_a_slow_server_is_given_up_on(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.faults["a.tar"] = ["slow"]
    server.pause = 0.6
    with pytest.raises(Unreachable, match=r"no byte for 0\.1 s"):
        fetch(ShardCache(tmp_path, 10**6), server)


@pytest.mark.parametrize("faults", [["busy", "busy", "ok"], ["short", "closed", "ok"], ["closed", "busy", "ok"]])
def test_a_download_that_breaks_off_goes_on(tmp_path: Path, server: Server, faults: list[str]) -> None:
    server.faults["a.tar"] = faults
    assert fetch(ShardCache(tmp_path, 10**6), server).read_bytes() == SHARD


def test_bytes_damaged_on_the_way_come_again(tmp_path: Path, server: Server) -> None:
    server.faults["a.tar"] = ["wrong", "ok"]
    assert fetch(ShardCache(tmp_path, 10**6), server).read_bytes() == SHARD


def test_a_shard_that_is_not_the_manifest_s_is_refused(tmp_path: Path, server: Server) -> None:
    server.faults["a.tar"] = ["wrong"]
    with pytest.raises(ValueError, match=rf"what came has sha256 .* manifest lists {DIGEST[:12]}.* Upload"):
        fetch(ShardCache(tmp_path, 10**6), server)
    assert names(tmp_path) == set()


def test_another_content_under_the_same_address_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    cache = ShardCache(tmp_path, 10**6)
    old = fetch(cache, server)
    server.files["a.tar"] = SHARD[::-1]
    new = fetch(cache, server)
    assert old != new
    assert new.read_bytes() == SHARD[::-1]


def test_a_kept_file_that_lost_its_end_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    cache = ShardCache(tmp_path, 10**6)
    os.truncate(fetch(cache, server), 1000)
    assert fetch(cache, server).read_bytes() == SHARD


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, server: Server) -> None:
    cache = ShardCache(tmp_path, 2 * len(SHARD))
    for age, name in ((30, "a.tar"), (20, "b.tar")):
        path = fetch(cache, server, name)
        os.utime(path, (time.time() - age, time.time() - age))
    fetch(cache, server, "a.tar")  # used again, so b is the older one now
    fetch(cache, server, "c.tar")
    server.gets.clear()
    fetch(cache, server, "a.tar")
    assert not server.gets
    fetch(cache, server, "b.tar")
    assert server.gets == {"b.tar": 1}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.kept")) <= 2 * len(SHARD)


def test_a_shard_in_use_survives_its_removal(tmp_path: Path, server: Server) -> None:
    cache = ShardCache(tmp_path, len(SHARD))
    path = fetch(cache, server, "a.tar")
    with path.open("rb") as file:
        fetch(cache, server, "b.tar")
        assert not path.exists()
        assert file.read() == SHARD


def test_what_was_just_handed_out_is_not_removed_before_it_can_be_opened(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "GRACE", 0.5)
    cache = ShardCache(tmp_path, len(SHARD))
    fetch(cache, server, "a.tar")
    start = time.time()
    fetch(cache, server, "b.tar")
    assert time.time() - start > 0.4


def test_a_cache_smaller_than_one_shard_is_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"has 0\.000102 GB, but data\.cache_gb .* 5e-05 GB. Raise data\.cache_gb"):
        fetch(ShardCache(tmp_path, 50_000), server)
    assert not server.gets


def test_a_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "RESERVE", shutil.disk_usage(tmp_path).total)
    with pytest.raises(ValueError, match=r"free on the cache's disk. Free some, or point data\.cache elsewhere"):
        fetch(ShardCache(tmp_path, 10**6), server)
    assert not server.gets
    assert names(tmp_path) == set()


def test_a_full_disk_makes_the_cache_give_up_what_it_keeps(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path, 10**9)
    old = fetch(cache, server, "a.tar")
    usage = shutil.disk_usage(tmp_path)
    room = usage._replace(free=len(SHARD) + 100)
    none = usage._replace(free=100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: none if old.exists() else room)
    assert fetch(cache, server, "b.tar").exists()
    assert not old.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"The cache .*cache cannot take .*a\.tar.* Point data\.cache at a folder"):
        fetch(ShardCache(tmp_path / "cache", 10**6), server)


def test_a_disk_that_fails_under_the_download_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int, _start: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device\. Point data\.cache"):
        fetch(ShardCache(tmp_path, 10**6), server)
    assert names(tmp_path) == set()


def test_a_cache_that_is_only_read_from_hands_out_what_it_has(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(ShardCache(tmp_path, 10**6), server)

    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module.os, "utime", refuse)
    assert fetch(ShardCache(tmp_path, 10**6), server) == path


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path, server: Server) -> None:
    dead, living = tmp_path / "dead.partial", tmp_path / "living.partial"
    dead.write_bytes(b"half")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fetch(ShardCache(tmp_path, 10**6), server)
        assert not dead.exists()
        assert living.exists()


def test_a_dead_process_s_half_is_no_part_of_what_is_fetched_next(tmp_path: Path, server: Server) -> None:
    cache = ShardCache(tmp_path, len(SHARD))
    path = fetch(cache, server)
    path.rename(path.with_suffix(".partial"))
    with path.with_suffix(".partial").open("ab") as file:
        file.write(b"longer than the shard")
    assert fetch(cache, server).read_bytes() == SHARD


def _race(folder: Path, url: str, start: float, paths: "multiprocessing.Queue[str]") -> None:
    time.sleep(max(0.0, start - time.time()))
    path = ShardCache(folder, 10**6).fetch(url, DIGEST, len(SHARD))
    assert path.read_bytes() == SHARD
    paths.put(str(path))


def test_processes_that_want_the_same_shard_fetch_it_once(tmp_path: Path, server: Server) -> None:
    server.faults["a.tar"] = ["slow"]
    server.pause = 0.5
    context = multiprocessing.get_context("fork")
    paths: multiprocessing.Queue[str] = context.Queue()
    arguments = (tmp_path, f"{server.url}/a.tar", time.time() + 0.3, paths)
    racers = [context.Process(target=_race, args=arguments) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert len({paths.get(timeout=5) for _ in racers}) == 1
    assert server.gets == {"a.tar": 1}
    assert names(tmp_path) == {".kept"}


def _churn(folder: Path, url: str, seed: int) -> None:
    cache_module.GRACE = 0.05
    for turn in range(12):
        data = (SHARD, SHARD[::-1], SHARD[:-512])[(seed + turn) % 3]
        name = "abc"[(seed + turn) % 3]
        path = ShardCache(folder, 2 * len(SHARD)).fetch(
            f"{url}/{name}.tar", hashlib.sha256(data).hexdigest(), len(data)
        )
        with path.open("rb") as file:
            assert file.read() == data


def test_processes_that_push_each_other_s_shards_out_still_read_the_right_ones(tmp_path: Path, server: Server) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_churn, args=(tmp_path, server.url, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert sum(path.stat().st_size for path in tmp_path.glob("*.kept")) <= 2 * len(SHARD)
