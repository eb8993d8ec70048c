"""Archives are read strictly: no damage and no harm gets past the index."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from deepstack_pl.data.index import build_index
from deepstack_pl.data.shards import ShardWriter

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
        build_index(shard)


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
        build_index(craft(tmp_path / "x.tar", *members))


def test_folders_and_dot_slash_names_as_tar_writes_them_are_read(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./part")
    folder.type = tarfile.DIRTYPE
    shard = craft(tmp_path / "x.tar", folder, ("./part/a.json", b"{}"), ("./part/a.seg.png", b"1"))
    index = build_index(shard)
    assert [(index.key(sample), list(index.members(sample))) for sample in range(len(index))] == [
        ("part/a", ["json", "seg.png"])
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", "member a.json cannot be read"),
        ("a.json", b"[" * 10**5, "member a.json cannot be read"),
        ("a\nb.json", b"{}", r"has a name with control characters"),
        ("a\u202eb.json", b"{}", r"has a name with control characters"),
    ],
)
def test_json_and_names_that_cannot_be_read_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(craft(tmp_path / "x.tar", (name, data)))


def patched(shard: Path, at: int, value: bytes) -> None:
    """Change a header and make its checksum right again: the archive is well formed, and means harm."""
    data = bytearray(shard.read_bytes())
    data[at : at + len(value)] = value
    header = data[:512]
    header[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(header)
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\xff", "has a name that is not UTF-8"),
        (124, b"77777777777\0", "beyond the file's"),
        (124, b"-0000000001\0", "no header at byte 0"),
        (124, b"\x80" + bytes(10) + b"\x01", "no header at byte 0"),
        (156, b"S", "a link, a device or sparse"),
        (156, b"3", "a link, a device or sparse"),
        (156, b"x", "an extended header that cannot be read"),
    ],
)
def test_a_header_that_means_harm_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    shard = craft(tmp_path / "x.tar", ("a.json", b"{}"), ("b.json", b"{}"))
    patched(shard, at, value)
    with pytest.raises(ValueError, match=message):
        build_index(shard)


def test_a_member_above_the_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    shard = craft(tmp_path / "x.tar", ("a.json", b"{}"))
    patched(shard, 124, b"%011o\0" % (2**30 + 512))
    with shard.open("r+b") as file:
        file.truncate(2**30 + 10240)  # sparse
    with pytest.raises(ValueError, match=r"has 1073742336 bytes; at most 1,073,741,824 are read"):
        build_index(shard)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_are_read_as_each_kind_of_tar_writes_them(tmp_path: Path, kind: int) -> None:
    key = "/".join(["p" * 60] * (2 if kind == tarfile.USTAR_FORMAT else 6)) + "/0"
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for name in (f"{key}.json", "ü.json" if kind != tarfile.USTAR_FORMAT else "u.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    index = build_index(tmp_path / "x.tar")
    assert [index.key(0), index.key(1)] == [key, "u" if kind == tarfile.USTAR_FORMAT else "ü"]


def test_an_extended_header_may_not_set_a_size(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.size, info.pax_headers = 2, {"GNU.sparse.major": "1"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=r"extended header that sets GNU\.sparse\.major"):
        build_index(tmp_path / "x.tar")


def test_an_extended_header_that_lost_what_it_says_is_refused(tmp_path: Path) -> None:
    """The member would be given the short name that stands in its own header."""
    for kind, message in ((tarfile.PAX_FORMAT, "holds nothing"), (tarfile.GNU_FORMAT, "a long name that is empty")):
        with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
            info = tarfile.TarInfo("d" * 120 + ".json")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        data = bytearray((tmp_path / "x.tar").read_bytes())
        data[512:1024] = bytes(512)
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            build_index(tmp_path / "x.tar")
