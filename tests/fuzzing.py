"""A target for each parser of foreign input: a sound document, spoiled at random, and what the parser may do with it.

A target draws what is spoiled and how, and calls the parser. It may return a value, or raise what its docstring names;
anything else is a fault. tests/test_fuzzing.py tries each a little, always the same; experiments/drill/fuzz.py for
minutes, with new seeds.
"""

import io
import json
import tarfile
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from benchmark_files import WRITERS, write_benchmark
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from deepstack_pl.config.load import load
from deepstack_pl.data.index import ShardIndex, build_index, sidecar
from deepstack_pl.data.llava_json import LlavaJsonSource
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.sources import ShardSource
from deepstack_pl.evaluation.benchmark import Benchmark
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.published.configuration import read_config
from deepstack_pl.serving.asked import read_request
from deepstack_pl.serving.config import Limits
from deepstack_pl.serving.replies import Refusal
from deepstack_pl.stacking.config import Host
from deepstack_pl.training.checkpoints import MANIFEST, name_of, newest, seal
from deepstack_pl.vision.images import decode_image, image_size

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

_WORDS = st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "<image>",
        "<image>\n<image>",
        "../../etc/passwd",
        "/",
        "é",
        "\ud800",
        "👩‍🚀",
        "שלום",
        "a" * 5000,
        "1e999",
    ]
)
_NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")]
)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, _WORDS, st.text(max_size=8))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=4), inner, max_size=3),
)


def spoiled(data: st.DataObject, document: Any) -> Any:
    """``document`` of plain values with up to three things changed: lost, doubled, of another kind, out of bounds."""
    document = deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        at: Any = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            key = data.draw(st.sampled_from(keys), "at")
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 3), "deeper"):
                at = at[key]
                continue
            match data.draw(st.sampled_from(["lost", "other", "other", "doubled", "new"]), "how"):
                case "lost":
                    del at[key]
                case "doubled" if isinstance(at, list):
                    at.append(at[key])
                case "new" if isinstance(at, dict):
                    at[data.draw(_WORDS, "name")] = data.draw(_VALUES, "value")
                case _:
                    at[key] = data.draw(_VALUES, "value")
            break
    return document


def spoiled_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """``whole`` cut, with bytes changed, zeroed, put in or left out."""
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        at = data.draw(st.integers(0, max(len(found) - 1, 0)), "at")
        length = data.draw(st.sampled_from([1, 2, 4, 16, 512, 1024]), "length")
        match data.draw(st.sampled_from(["cut", "flip", "flip", "zero", "lose", "put", "repeat"]), "how"):
            case "cut":
                del found[at:]
            case "flip" if found:
                found[at] ^= data.draw(st.integers(1, 255), "bits")
            case "zero":
                found[at : at + length] = bytes(len(found[at : at + length]))
            case "lose":
                del found[at : at + length]
            case "put":
                found[at:at] = data.draw(st.binary(max_size=16), "bytes")
            case _:
                found[at:at] = found[at : at + length]
    return bytes(found)


def as_json(data: st.DataObject, document: Any) -> bytes:
    """A JSON file of ``document``, spoiled as a document or as bytes."""
    if data.draw(st.integers(0, 3), "as bytes") == 0:
        return spoiled_bytes(data, json.dumps(document).encode())
    return json.dumps(spoiled(data, document)).encode()


def fuzz_llava_json(data: st.DataObject, folder: Path) -> None:
    """ValueError, or an OSError that names a file."""
    (folder / "a.png").write_bytes(_picture("PNG"))
    (folder / "records.json").write_bytes(as_json(data, _RECORDS))
    try:
        source = LlavaJsonSource(folder / "records.json", folder)
        _ = source.fingerprint, source.columns
    except (ValueError, OSError) as error:
        _named(error)
        return
    _read_all(source)


def fuzz_shard(data: st.DataObject, folder: Path) -> None:
    """ValueError, or an OSError that names a file: for a tar, and for the JSON and the picture in it."""
    if data.draw(st.booleans(), "the tar"):
        (folder / "shard-000000.tar").write_bytes(spoiled_bytes(data, _shard()))
    else:
        members = {"json": as_json(data, _RECORDS[0]), "png": spoiled_bytes(data, _picture("PNG"))}
        with tarfile.open(folder / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"000000000.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    try:
        for shard in folder.glob("*.tar"):
            build_index(shard)
        source = ShardSource(folder)
    except (ValueError, OSError) as error:
        _named(error)
        return
    _read_all(source)


def fuzz_index(data: st.DataObject, folder: Path) -> None:
    """ValueError."""
    shard = folder / "shard-000000.tar"
    shard.write_bytes(_shard())
    build_index(shard).save(sidecar(shard))
    sidecar(shard).write_bytes(spoiled_bytes(data, sidecar(shard).read_bytes()))
    try:
        index = ShardIndex.load(sidecar(shard))
        for sample in range(len(index)):
            index.key(sample), index.members(sample), index.images(sample)
    except ValueError as error:
        _named(error)


def fuzz_published_config(data: st.DataObject, folder: Path) -> None:
    """ValueError: a published checkpoint's config.json, its tower's and its pixels'."""
    published, tower, pixels = (deepcopy(each) for each in _published())
    which = data.draw(st.sampled_from(["config", "config", "tower", "pixels"]), "which")
    if which == "config":
        published = spoiled(data, published)
    elif which == "tower":
        tower = spoiled(data, tower)
    else:
        pixels = spoiled(data, pixels)
    try:
        read_config(published, tower, pixels)
    except ValueError as error:
        _named(error)


def fuzz_config(data: st.DataObject, folder: Path) -> None:
    """ValueError: the LLM, the tower and the plan in the config.json of an exported folder."""
    values = deepcopy(_exported())
    key = data.draw(st.sampled_from(["plan", "plan", "vision", "text_config"]), "which")
    (folder / "config.json").write_text(json.dumps({**values, key: spoiled(data, values[key])}))
    try:
        found = DeepStackConfig.from_pretrained(folder)
        assert isinstance(found, DeepStackConfig)
        found.typed_vision()
        plan = found.typed_plan()
        for injection in plan.injections:
            last = plan.llm_layers - 1 if injection.host is Host.llm else plan.vit_layers
            assert injection.layer in range(last + 1), "it would never happen"
    except ValueError as error:
        _named(error)


def fuzz_run_config(data: st.DataObject, folder: Path) -> None:
    """ValueError, or an error of OmegaConf's: a run's config.yaml."""
    text = yaml.safe_dump(spoiled(data, _run()), allow_unicode=True, sort_keys=False).encode()
    if data.draw(st.booleans(), "as bytes"):
        text = spoiled_bytes(data, text)
    (folder / "config.yaml").write_bytes(text)
    try:
        load(folder / "config.yaml", [])
    except (ValueError, OmegaConfBaseException) as error:
        _named(error)


def fuzz_manifest(data: st.DataObject, folder: Path) -> None:
    """Nothing is raised: a checkpoint that is none is passed over, and why is said."""
    place = folder / name_of(10)
    place.mkdir()
    for name in (".metadata", "run.pt", "process-0.pt"):
        (place / name).write_bytes(b"")
    if data.draw(st.booleans(), "sealed"):  # by somebody who knows how
        document = spoiled(data, _MANIFEST)
        try:
            text = seal(document)
        except (TypeError, ValueError, AttributeError):
            return
    else:
        text = as_json(data, json.loads(seal(_MANIFEST)))
    (place / MANIFEST).write_bytes(text)
    found, passed = newest(folder, deep=True)
    assert (found is None) == bool(passed)
    assert all(str(place) in sentence for sentence in passed)


def fuzz_request(data: st.DataObject, folder: Path) -> None:
    """Refusal: what a client sends to the server; ValueError of what is decoded later."""
    try:
        asked = read_request(spoiled(data, _REQUEST), model="tiny", limits=Limits(), positions=256, root=folder)
    except Refusal as refusal:
        _named(refusal)
        return
    try:
        asked.record()
    except ValueError as error:
        _named(error)


def fuzz_image(data: st.DataObject, folder: Path) -> None:
    """ValueError: a picture, of which the header says little."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), "kind")
    spoilt = spoiled_bytes(data, _picture(kind))
    for read in (lambda: image_size(spoilt, "picture"), lambda: decode_image(spoilt, "picture")):
        try:
            read()
        except ValueError as error:
            _named(error)


def fuzz_benchmark(data: st.DataObject, folder: Path) -> None:
    """ValueError, or an OSError that names a file: a benchmark's published question files."""
    name = data.draw(st.sampled_from(sorted(WRITERS)), "benchmark")
    config = write_benchmark(name, folder, samples=2)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".jsonl"))
    file = data.draw(st.sampled_from(files), "file")
    try:
        file.write_bytes(as_json(data, json.loads(file.read_text())))
    except ValueError:  # a document a line
        lines = spoiled(data, [json.loads(line) for line in file.read_text().splitlines()])
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        benchmark = Benchmark.open(name, config)
        for place in range(len(benchmark)):
            benchmark.record(place)
        benchmark.metrics(benchmark.judge([(place, "red", None) for place in range(len(benchmark))]), 0.95)
    except (ValueError, OSError) as error:
        _named(error)


TARGETS: dict[str, Callable[[st.DataObject, Path], None]] = {
    name.removeprefix("fuzz_"): target for name, target in globals().items() if name.startswith("fuzz_")
}


def tried(target: Callable[[st.DataObject, Path], None], data: st.DataObject) -> None:
    """``target``, in a folder of its own."""
    with TemporaryDirectory() as folder:
        target(data, Path(folder))


def _named(error: Exception) -> None:
    """A refusal says something."""
    assert str(error).strip()


def _read_all(source: Any) -> None:
    """Every record and what is known of it: a refusal is of the record, which it names."""
    for place in range(len(source)):
        for read in (source.__getitem__, source.outline):
            try:
                read(place)
            except (ValueError, OSError) as error:
                _named(error)


_RECORDS = [
    {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "Gold."},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "Teal."},
        ],
    },
    {"id": "2", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]},
]
_MANIFEST = {
    "version": 1,
    "step": 10,
    "world": 1,
    "facts": {"plan": "a"},
    "files": {
        name: {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
        for name in (".metadata", "run.pt", "process-0.pt")
    },
}


@cache
def _picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((16, 12), 60).convert("RGB").save(stream, format=kind)
    return stream.getvalue()


@cache
def _shard() -> bytes:
    with TemporaryDirectory() as folder:
        with ShardWriter(Path(folder)) as writer:
            for record in _RECORDS:
                writer.write(record, [_picture("PNG")] if "image" in record else [])
        (shard,) = Path(folder).glob("*.tar")
        return shard.read_bytes()


@cache
def _published() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    case = json.loads((GOLDEN / "cases" / "l_default" / "config.json").read_text())
    tower, pixels = (
        json.loads((GOLDEN / "vision_tower" / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    read_config(case, tower, pixels)
    return case, tower, pixels


@cache
def _exported() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        read_config(*_published()).save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


@cache
def _run() -> dict[str, Any]:
    return yaml.safe_load((TESTS / "experiments" / "resolved" / "debug.yaml").read_text())


def _uri() -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(_picture("PNG")).decode()


_REQUEST: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": _uri(), "detail": "auto"}},
            ],
        },
        {"role": "assistant", "content": "Gold."},
        {"role": "user", "content": "And?"},
    ],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["."],
    "stream": True,
    "stream_options": {"include_usage": True},
}
