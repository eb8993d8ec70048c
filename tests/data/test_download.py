"""Remote files by address: other stores than HTTP, addresses that are refused, lengths that are not told."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from faulty_server import Server, serve

from deepstack_pl.data import cache as cache_module
from deepstack_pl.data import download
from deepstack_pl.data.cache import ShardCache
from deepstack_pl.data.download import Download, NotThere, Unreachable, check_url, read_small, remote_size, shown

SHARD = bytes(range(256)) * 400
DIGEST = hashlib.sha256(SHARD).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(cache_module, "RESERVE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve({"a.tar": SHARD}) as state:
        yield state


def test_other_stores_are_read_through_fsspec(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.tar", SHARD)
    path = ShardCache(tmp_path, 10**6).fetch("memory://bucket/a.tar", DIGEST, len(SHARD))
    assert path.read_bytes() == SHARD
    local = tmp_path / "b.tar"
    local.write_bytes(SHARD)
    assert remote_size(str(local)) == remote_size("memory://bucket/a.tar") == len(SHARD)
    assert read_small(f"file://{local}") == SHARD
    with pytest.raises(NotThere, match="memory://bucket/none"):
        read_small("memory://bucket/none")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:cat shard.tar", "commands and chained addresses are not run"),
        ("simplecache::http://host/a.tar", "commands and chained addresses are not run"),
        ("nosuch://host/a.tar", r"nosuch.* Use http\(s\)://, hf://, s3://, gs://"),
    ],
)
def test_addresses_that_cannot_be_opened_are_refused_by_name(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_url(url)


def test_a_store_whose_package_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(download.fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/a.tar: s3:// needs a package .*Install s3fs"):
        check_url("s3://bucket/a.tar")


def test_gs_goes_through_gsutil_where_gcsfs_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(SHARD)
    tool = tmp_path / "gsutil"
    tool.write_text(
        f'#!/bin/sh\nfile="{tmp_path}/${{2##*/}}"\n'
        '[ -f "$file" ] || { echo "No URLs matched: $2" >&2; exit 1; }\n'
        'if [ "$1" = du ]; then echo "$(wc -c < "$file")  $2"; else cat "$file"; fi\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda _name: None)
    check_url("gs://bucket/a.tar")
    assert remote_size("gs://bucket/a.tar") == len(SHARD)
    assert read_small("gs://bucket/a.tar") == SHARD
    with Download("gs://bucket/a.tar", len(SHARD)) as stream:
        assert stream.read(10**6) == SHARD
    with pytest.raises(Unreachable, match=r"gs://bucket/b\.tar: gsutil: No URLs matched"):
        remote_size("gs://bucket/b.tar")


def test_messages_show_no_password_and_no_signature() -> None:
    assert shown("https://me:secret@host:8/a.tar?X-Signature=secret") == "https://host:8/a.tar"
    assert shown("data/odd?name.tar") == "data/odd?name.tar"


def test_a_server_that_hides_the_length_is_refused_where_a_cut_could_not_be_told(server: Server) -> None:
    server.faults["a.tar"] = ["unsized"]
    with pytest.raises(Unreachable, match="does not say how long"):
        remote_size(f"{server.url}/a.tar")


def test_a_small_file_that_is_not_small_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "manifest.json"
    local.write_bytes(SHARD)
    monkeypatch.setattr(download, "SMALL", len(SHARD) - 1)
    monkeypatch.setattr(download.Download, "read", lambda *_: pytest.fail("it was read"))
    for ask in (read_small, lambda url: ShardCache(tmp_path / "cache", 10**9).fetch_small(url, "1")):
        with pytest.raises(ValueError, match=r"manifest\.json has [\d,]+ bytes, where a small file"):
            ask(f"file://{local}")
