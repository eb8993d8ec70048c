"""deepstack fetch: from a stand-in for the hub, to where runs look."""

import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants as hub
import pytest
import yaml
from huggingface_hub.utils import disable_progress_bars
from stand_in_hub import SHA, Hub, serve
from tiny_run import CONF, run_of

from deepstack_pl.cli import fetch
from deepstack_pl.cli.catalogue import UNKNOWN, catalogue
from deepstack_pl.cli.main import main

PHI3, LCS, LLAVA = "microsoft/Phi-3-mini-4k-instruct", "liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/") + ".jpg", data)
    return buffer.getvalue()


@pytest.fixture
def held() -> Hub:
    return Hub(
        {
            f"models/{PHI3}": {
                "config.json": b"{}",
                "model-00001-of-00001.safetensors": b"w" * 1000,
                "pytorch_model.bin": b"w" * 1000,
                "README.md": b"# Phi",
                "onnx/model.safetensors": b"o" * 1000,
            },
            "models/lmsys/vicuna-7b-v1.5": {"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"w" * 10},
            "models/meta-llama/Meta-Llama-3-8B-Instruct": {"model.safetensors": b"w"},
            "models/timm/vit_large_patch14_clip_336.openai": {
                "open_clip_model.safetensors": b"c" * 10,
                "model.safetensors": b"t" * 10,
            },
            f"datasets/{LCS}": {
                "blip_laion_cc_sbu_558k.json": b"[]",
                "images.zip": zipped(_00453__004539375=b"cat", _00223__002239345=b"dog"),
                "other.json": b"[]",
            },
            f"datasets/{LLAVA}": {"llava_v1_5_mix665k.json": b"[]"},
        },
        gated={"models/meta-llama/Meta-Llama-3-8B-Instruct"},
    )


@pytest.fixture(autouse=True)
def _served(held: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    with serve(held, tmp_path / "cache", monkeypatch):
        yield


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["fetch", *words]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts}


def test_weights_come_once_and_into_the_cache_where_runs_look(
    capsys: pytest.CaptureFixture[str], held: Hub, tmp_path: Path
) -> None:
    out = said(capsys, "phi3")
    snapshot = tmp_path / "cache" / f"models--{PHI3.replace('/', '--')}" / "snapshots" / SHA
    assert files(snapshot) == {"config.json", "model-00001-of-00001.safetensors"}
    assert "licence: MIT" in out
    assert out.endswith("then: python train.py llm=phi3\n")
    before = held.sent
    assert "phi3: 0.0 GB to write" in said(capsys, "phi3")
    assert held.sent == before


def test_weights_without_safetensors_come_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "llm.checkpoint=there/vicuna_7b\n" in said(capsys, "vicuna_7b", "--to", "there").replace(f"{tmp_path}/", "")
    assert files(tmp_path / "there/vicuna_7b") == {"config.json", "pytorch_model-00001-of-00002.bin"}


def test_a_tower_is_pointed_at_by_its_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = said(capsys, "clip_l_336", "--to", "there")
    assert f"vision.open_clip_weights={tmp_path}/there/clip_l_336/open_clip_model.safetensors" in out
    assert files(tmp_path / "there") == {"clip_l_336/open_clip_model.safetensors"}


def test_a_corpus_lies_where_its_data_option_looks(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "lcs558k", "--to", "here")
    data = run_of("data=lcs558k", "data.root=here", "llm=tiny").data
    assert data.path is not None
    assert data.images is not None
    assert (Path(data.root) / data.path).read_bytes() == b"[]"
    assert files(Path(data.root) / data.images) == {"_00453/004539375.jpg", "_00223/002239345.jpg"}
    assert "then: deepstack shards build data=lcs558k data.root=here\n" in out
    assert not list(Path("here").rglob("other.json"))


def test_images_that_the_hub_does_not_have_are_named_with_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "llava665k")
    assert Path("data/llava/llava_v1_5_mix665k.json").is_file()
    for place in (
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    ):
        assert f"  {place}/: " in out


def test_a_connection_that_breaks_goes_on_at_the_same_byte(
    capsys: pytest.CaptureFixture[str], held: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(hub, "DOWNLOAD_CHUNK_SIZE", 10)
    held.breaks = 300
    said(capsys, "phi3", "--to", "there")
    assert (tmp_path / "there/phi3/model-00001-of-00001.safetensors").read_bytes() == b"w" * 1000
    assert held.sent == 1000 + len("{}")


def test_after_ctrl_c_whole_files_are_kept(
    capsys: pytest.CaptureFixture[str], held: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download = huggingface_hub.snapshot_download

    def stopped(*args: Any, allow_patterns: list[str], dry_run: bool = False, **kwargs: Any) -> Any:
        if dry_run:
            return snapshot_download(*args, allow_patterns=allow_patterns, dry_run=True, **kwargs)
        snapshot_download(*args, allow_patterns=allow_patterns[:1], **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", stopped)
        assert main(["fetch", "phi3", "--to", "there"]) == 130
    assert files(Path("there/phi3")) == {"config.json"}
    said(capsys, "phi3", "--to", "there")
    assert files(Path("there/phi3")) == {"config.json", "model-00001-of-00001.safetensors"}
    assert held.sent == 1000 + len("{}")


def test_unpacking_goes_on_and_refuses_a_damaged_archive(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    archive.write_bytes(zipped(a=b"whole", b=b"cut"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"WHOLE")
    (tmp_path / "images/b.jpg").write_bytes(b"c")
    fetch.unpack(archive, tmp_path / "images")
    assert [(tmp_path / f"images/{n}.jpg").read_bytes() for n in "ab"] == [b"WHOLE", b"cut"]
    archive.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"images\.zip is damaged"):
        fetch.unpack(archive, tmp_path / "images")


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "{folder}/x.jpg"])
def test_an_archive_with_a_name_that_leaves_the_folder_is_not_unpacked(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("first.jpg", b"whole")
        packed.writestr(name.format(folder=tmp_path), b"elsewhere")
    with pytest.raises(ValueError, match=r"x\.jpg' leaves the folder"):
        fetch.unpack(archive, tmp_path / "images")
    assert files(tmp_path) == {"images.zip"}


def test_a_link_in_an_archive_is_a_file_and_leads_nowhere(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as packed:
        packed.writestr(link, str(tmp_path))
    fetch.unpack(tmp_path / "images.zip", tmp_path / "images")
    assert not (tmp_path / "images/link").is_symlink()


def test_an_archive_that_unfolds_beyond_the_disk_or_beyond_what_it_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros.jpg", bytes(10**7))
    assert archive.stat().st_size < 20_000
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
        with pytest.raises(ValueError, match=r"images\.zip: 0\.0 GB would be unpacked, and 0\.0 GB are free"):
            fetch.unpack(archive, tmp_path / "images")
    assert not (tmp_path / "images").exists()
    data = archive.read_bytes()
    archive.write_bytes(data.replace((10**7).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"images\.zip is damaged .*CRC"):
        fetch.unpack(archive, tmp_path / "images")
    assert sum(file.stat().st_size for file in (tmp_path / "images").iterdir()) <= 1000


@pytest.mark.parametrize("words", [("phi3",), ("lcs558k",), ("llava665k", "--to", "there")])
def test_offline_says_so_and_leaves_nothing(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert said(capsys, *words, status=1).startswith("HF_HUB_OFFLINE is set: nothing can be fetched.")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    assert f"{words[0]}: the Hugging Face hub cannot be reached (ConnectError)" in said(capsys, *words, status=1)
    assert not list(tmp_path.iterdir())


def test_a_gated_repository_says_how_to_log_in(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    err = said(capsys, "llama3_8b", status=1)
    assert "llama3_8b: meta-llama/Meta-Llama-3-8B-Instruct is gated. Accept its licence at http" in err
    assert "`hf auth login`" in err
    assert {Path(file).name for file in files(tmp_path)} == {"main"}  # the client's note of the newest revision


def test_a_repository_that_is_not_there_or_holds_other_things_is_named(
    capsys: pytest.CaptureFixture[str], held: Hub
) -> None:
    assert "mistral_7b: the hub shows no mistralai/" in said(capsys, "mistral_7b", status=1)
    held.repos["models/mistralai/Mistral-7B-Instruct-v0.3"] = {"consolidated.safetensors": b"w"}
    assert "has no model*.safetensors, pytorch_model*.bin" in said(capsys, "mistral_7b", status=1)


def test_too_little_disk_is_refused_with_both_numbers_for_all_names_together(
    capsys: pytest.CaptureFixture[str], held: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, names in ((1001, "phi3"), (1013, "phi3, vicuna_7b")):
        usage = shutil._ntuple_diskusage(10**9, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        err = said(capsys, *names.split(", "), status=1)
        assert err.startswith(f"{names}: 0.0 GB are needed on the disk of {tmp_path}/cache, where 0.0 GB are free.")
    assert held.sent == 0


def test_a_name_that_nobody_knows_gives_the_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean clip_l_336?" in said(capsys, "clip_l336", status=1)
    assert "name what to fetch" in said(capsys, status=1)


def test_every_checkpoint_of_conf_is_in_the_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    rows = {row.split()[0]: row for row in said(capsys, "--list").splitlines() if row.strip()}
    for group in ("llm", "vision"):
        for file in (CONF / group).glob("*.yaml"):
            values = yaml.safe_load(file.read_text())
            if values.get("checkpoint"):
                assert values["checkpoint"] in rows[file.stem]
    assert {"clip_l_336", "lcs558k", "llava665k", "sharegpt4v_pt", "sharegpt4v_sft", "deepstack_l_vicuna_7b"} <= {*rows}
    assert "licence" in rows["name"]


def test_a_new_option_is_fetched_without_a_line_in_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "mine.yaml").write_text("name: mine\ncheckpoint: me/mine\n")
    entry = catalogue(tmp_path)["mine"]
    assert (entry.repo, entry.licence, entry.size) == ("me/mine", UNKNOWN, None)
