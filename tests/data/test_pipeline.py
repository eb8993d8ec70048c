"""The webdataset stream: equal, repeatable, nothing dropped, and no damaged shard taken for a shorter one."""

import gc
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from faulty_server import Server, serve
from PIL import Image
from torch.utils.data import _utils

from deepstack_pl.batch import MultimodalBatch, PadSide, Reason, Record, Refused, Sample, collate
from deepstack_pl.data import download, pipeline
from deepstack_pl.data.config import Batching, DataConfig, MixtureEntry
from deepstack_pl.data.pipeline import PipelineSource, pipeline_loader
from deepstack_pl.data.shards import ShardWriter

TEXT = "answer"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(pipeline, "BUFFER", 4)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def sample(key: str, source: str, refused: tuple[Reason, str] | None = None, images: int = 0) -> Sample:
    ids = torch.tensor([1, 2, 3])
    return Sample(
        key=key,
        input_ids=ids,
        labels=ids,
        views=torch.zeros(images, 3, 4, 4, dtype=torch.uint8),
        images=images,
        token_index=torch.full((3,), -1),
        sequence_rows=torch.zeros(0, dtype=torch.long),
        group_rows=torch.zeros(1, 0, dtype=torch.long),
        vit_rows=torch.full((0, images), -1),
        source=source,
        refused=refused,
    )


def prepare(record: Record) -> Sample:
    if "too long" in record.turns[-1].text:
        raise Refused(Reason.too_long, f"{record.key}: too long")
    return sample(record.key, record.source, images=len(record.images))


def blank(key: str, source: str, refused: tuple[Reason, str] | None) -> Sample:
    return sample(key, source, refused)


stack = partial(collate, pad_id=0, side=PadSide.right, tokens_per_view=1)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Four shards of five samples; every fifth is text-only."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    with ShardWriter(folder, max_samples=5) as writer:
        for number in range(20):
            text = number % 5 == 0
            turns = [{"from": "human", "value": "Hi" if text else "<image>\nWhat?"}, {"from": "gpt", "value": TEXT}]
            image = {} if text else {"image": f"coco/{number}.png"}
            writer.write({"id": str(number), **image, "conversations": turns}, [] if text else [picture()])
    return {f"train/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture
def server(tars: dict[str, bytes]) -> Iterator[Server]:
    with serve(dict(tars)) as state:
        yield state


def config(urls: str, **values: object) -> DataConfig:
    settings = {"name": "far", "urls": urls, "batch_size": 4, "workers": 0, **values}
    return DataConfig(**settings)  # pyright: ignore[reportArgumentType]


def batches(config: DataConfig, *, steps: int = 6, **values: int) -> list[MultimodalBatch]:
    settings = {"seed": 0, "start_step": 0, **values}
    return list(pipeline_loader(config, prepare, blank, stack, steps=steps, **settings))  # pyright: ignore[reportArgumentType]


def keys(config: DataConfig, **values: int) -> list[list[str]]:
    return [batch.keys for batch in batches(config, **values)]


def all_shards(server: Server) -> str:
    return f"{server.url}/train/shard-{{000000..000003}}.tar"


def test_a_stream_shows_every_sample_sooner_or_later_under_its_key_and_source(server: Server) -> None:
    found = {}
    for batch in batches(config(all_shards(server)), steps=60):
        found |= dict(zip(batch.keys, batch.sources, strict=True))
        assert batch.refused == [None] * 4
    expected = {f"train/shard-{n // 5:06d}.tar:{n:09d}": "text" if n % 5 == 0 else "coco" for n in range(20)}
    assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_run_draws_the_same_samples_and_another_does_not(server: Server, workers: int) -> None:
    here = config(all_shards(server), workers=workers)
    drawn = keys(here)
    assert keys(here) == drawn
    assert keys(here, seed=1) != drawn
    assert keys(here, start_step=6) != drawn


def test_workers_of_one_process_draw_different_samples(server: Server) -> None:
    drawn = keys(config(all_shards(server), workers=2), steps=8)
    assert drawn[0::2] != drawn[1::2]


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 4, 0), (2, 1, 0), (2, 2, 2), (4, 1, 1)])
def test_every_process_sees_the_same_number_of_full_batches(
    server: Server, world: int, micro: int, workers: int
) -> None:
    here = config(all_shards(server), micro_batch_size=micro, workers=workers)
    loader = pipeline_loader(here, prepare, blank, stack, seed=0, start_step=0, steps=3, rank=0, world=world)
    drawn = [keys(here, steps=3, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in drawn} == {3 * 4 // (micro * world)} == {len(loader)}
    assert {len(batch) for rank in drawn for batch in rank} == {micro}
    assert len({str(rank) for rank in drawn}) == world


def test_refused_samples_become_rows_that_say_why(tmp_path: Path) -> None:
    def said(text: str, question: str = "<image>\nWhat?") -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": text}]

    with ShardWriter(tmp_path) as writer:
        writer.write({"id": "0", "image": "coco/0.png", "conversations": said(TEXT)}, [picture()[:-30]])
        writer.write({"id": "1", "image": "coco/1.png", "conversations": said(TEXT, "no placeholder")}, [picture()])
        writer.write({"id": "2", "conversations": said("too long", "Hi")})
        writer.write({"id": "3", "conversations": said(TEXT, "Hi")})
    found: dict[str, tuple[str, Reason | None]] = {}
    for batch in batches(config(str(tmp_path / "shard-000000.tar"))):
        assert len(batch.keys) == 4
        for key, source, refused in zip(batch.keys, batch.sources, batch.refused, strict=True):
            assert refused is None or key in refused[1]
            found[key[-1]] = source, refused and refused[0]
    assert found == {
        "0": ("coco", Reason.image),
        "1": ("coco", Reason.conversation),
        "2": ("text", Reason.too_long),
        "3": ("text", None),
    }


def _offsets(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def _middle(data: bytes) -> tarfile.TarInfo:
    return next(member for member in _offsets(data)[4:] if member.name.endswith(".json"))


def _patch(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch + data[at + len(patch) :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut before a header": lambda data: data[: _middle(data).offset],
    "cut in a header": lambda data: data[: _middle(data).offset + 100],
    "cut between a sample's members": lambda data: data[: _offsets(data)[4].offset],
    "cut in a member": lambda data: data[: _middle(data).offset_data + 10],
    "zeros in the middle": lambda data: _patch(data, _middle(data).offset, bytes(4 * 512)),
    "a garbage header": lambda data: _patch(data, _middle(data).offset, b"\x9b" * 512),
    "a patched header": lambda data: _patch(data, _middle(data).offset + 3, b"9"),
    "no end marker": lambda data: data[: _offsets(data)[-1].offset_data + 512],
    "one shard after another": lambda data: data + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damaged_shard_is_taken_for_a_shorter_one(server: Server, damage: str) -> None:
    name = "train/shard-000001.tar"
    server.files[name] = DAMAGE[damage](server.files[name])
    with pytest.raises(ValueError, match=rf"^{server.url}/{name}: .* Fetch or write the shard again\."):
        batches(config(f"{server.url}/{name}"), steps=20)


def test_damage_stops_a_run_with_workers_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # torch waits so long for each worker
    name = "train/shard-000003.tar"
    server.files[name] = DAMAGE["zeros in the middle"](server.files[name])
    with pytest.raises(ValueError, match=rf"{server.url}/{name}: "):
        batches(config(all_shards(server), workers=2), steps=60)
    gc.collect()  # the loader, and with it its workers, while the server still answers them


def _tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


RECORD = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}).encode()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.json", RECORD), ("b.json", RECORD), ("a.png", b"")], "a.png is there twice, or apart from the other"),
        ([("a.json", RECORD), ("a.JSON", RECORD)], "a.JSON is there twice"),
        ([("a.json", RECORD), ("README", b"")], "README is not named KEY.EXTENSION"),
        ([("a.png", b""), ("b.json", RECORD)], "a has no json"),
        ([("a.json", b"{")], "its json cannot be read"),
        ([("../a.json", RECORD)], "leaves the archive's folder"),
        ([], "holds no samples"),
    ],
)
def test_shards_that_are_none_of_ours_are_refused_with_the_place(
    server: Server, members: list[tuple[str, bytes]], said: str
) -> None:
    server.files["odd.tar"] = _tar(*members)
    with pytest.raises(ValueError, match=rf"odd\.tar.*{said}"):
        batches(config(f"{server.url}/odd.tar"))


@pytest.mark.parametrize("fault", ["short", "closed", "busy"])
def test_a_connection_that_breaks_is_taken_up_again_and_no_sample_is_lost(server: Server, fault: str) -> None:
    name = "train/shard-000000.tar"
    undisturbed = keys(config(f"{server.url}/{name}"))
    server.faults[name] = [fault, "ok"]
    assert keys(config(f"{server.url}/{name}")) == undisturbed


def test_a_server_that_stays_down_stops_the_run_by_name(server: Server) -> None:
    server.faults["train/shard-000000.tar"] = ["ok", "busy"]
    with pytest.raises(OSError, match=r"train/shard-000000\.tar: the server answered 503"):
        batches(config(f"{server.url}/train/shard-000000.tar"), steps=20)


def test_a_shard_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(OSError, match=r"train/none\.tar: there is no such file"):
        batches(config(f"{server.url}/train/none.tar"))


def test_stores_behind_fsspec_are_streamed(tars: dict[str, bytes]) -> None:
    for name, data in tars.items():
        fsspec.filesystem("memory").pipe(f"/pipeline/{name}", data)
    drawn = keys(config("memory://pipeline/train/shard-{000000..000003}.tar"))
    assert {key.partition(":")[0] for batch in drawn for key in batch} <= set(tars)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"urls": None}, r"without data\.urls"),
        ({"urls": "pipe:cat x.tar"}, "commands and chained addresses are not run"),
        ({"batching": Batching.packed}, r"data\.batching=packed plans from an index"),
        ({"mixture": [MixtureEntry(root="a")]}, r"data\.mixture with data\.stream=webdataset"),
    ],
)
def test_what_needs_an_index_is_refused_before_anything_is_read(values: dict[str, object], said: str) -> None:
    here = config(**{"urls": "x.tar", **values})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=said):
        pipeline_loader(here, prepare, blank, stack, seed=0, start_step=0, steps=1)


def test_the_fingerprint_is_of_the_names_and_the_line_says_so() -> None:
    one, other = PipelineSource(config("s-{0..3}.tar")), PipelineSource(config("s-{0..4}.tar"))
    assert one.fingerprint != other.fingerprint
    assert list(one.parts()) == ["s-0.tar", "s-1.tar", "s-2.tar", "s-3.tar"]
    assert one.describe().startswith("4 shards from s-0.tar on")
    assert "of the names, not of the bytes" in one.describe()
    signed = PipelineSource(config("https://host/a.tar?signature=1"))
    assert signed.fingerprint == PipelineSource(config("https://host/a.tar?signature=2")).fingerprint


def test_the_limits_are_told_once_by_the_first_process(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="deepstack_pl"):
        for rank in range(2):
            list(itertools.islice(batches(config(all_shards(server)), steps=1, rank=rank, world=2), 1))
    assert [record.getMessage() for record in caplog.records] == [pipeline.LIMITS]
