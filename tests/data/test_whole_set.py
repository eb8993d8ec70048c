"""A set that lost shards on its way is noticed when it is opened, and when it is verified."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import built, config_of
from replicas import write_replica

from deepstack_pl.cli.main import main
from deepstack_pl.data.config import DataConfig, MixtureEntry
from deepstack_pl.data.config import Source as Kind
from deepstack_pl.data.sources import open_sources


@pytest.fixture
def root(tmp_path: Path) -> Path:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    built(replica, tmp_path / "shards/lcs558k")
    return tmp_path / "shards/lcs558k"


def lose_a_split(root: Path) -> None:
    shutil.rmtree(root / "val")


def lose_its_shards(root: Path) -> None:
    for file in (*(root / "train").glob("*.tar"), *(root / "train").glob("*.npz")):
        file.unlink()


def lose_shard_and_manifest(root: Path) -> None:
    (root / "train/manifest.json").unlink()


def say_otherwise(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [lose_a_split, lose_its_shards, lose_shard_and_manifest, say_otherwise])
def test_a_set_that_is_not_whole_is_refused_and_found_by_verify(
    root: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(name="mine", source=Kind.shards, root=str(root))
    open_sources(config)
    assert main(["shards", "verify", f"root={root}"]) == 0
    damage(root)
    with pytest.raises(ValueError, match=r"train|val"):
        open_sources(config)
    capsys.readouterr()
    assert main(["shards", "verify", f"root={root}"]) == 1
    assert "damaged" in capsys.readouterr().out


def test_verify_names_every_shard_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    words = ["shards", "build", "data=lcs558k", f"data.root={tmp_path}", "processes=1"]
    assert main(words) == 0
    folder = tmp_path / "shards/lcs558k/train"
    manifest = json.loads((folder / "manifest.json").read_text())
    gone = [{**manifest["shards"][0], "name": f"shard-00000{n}.tar"} for n in (7, 8)]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [*manifest["shards"], *gone]}))
    assert main(["shards", "verify", f"root={folder}"]) == 1
    said = capsys.readouterr().err
    assert "shard-000007.tar is not there" in said
    assert "shard-000008.tar is not there" in said
    assert replica.name == "lcs558k"


def test_held_out_otherwise_than_the_run_says_is_refused(root: Path, tmp_path: Path) -> None:
    replica = write_replica("lcs558k", tmp_path, clean=True)
    open_sources(config_of(replica))
    with pytest.raises(ValueError, match=r"data\.val_samples=3, but the shards .* were built with 256"):
        open_sources(config_of(replica, val_samples=3))


def test_sources_have_the_name_of_the_corpus_also_when_opened_as_shards(root: Path) -> None:
    train, _ = open_sources(DataConfig(name="mine", source=Kind.shards, root=str(root)))
    assert train.columns.sources == ("lcs558k",)


def test_a_corpus_is_not_remote() -> None:
    with pytest.raises(ValueError, match=r"Remote shards: data=shards data\.root=URL"):
        open_sources(DataConfig(name="lcs558k", source=Kind.corpus, root="https://host/x"))


def test_a_part_of_a_mixture_that_is_not_whole_is_refused(root: Path) -> None:
    mixture = [MixtureEntry(root=str(root), repeat=2)]
    config = DataConfig(name="mine", source=Kind.shards, root=str(root), mixture=mixture)
    open_sources(config)
    lose_its_shards(root)
    with pytest.raises(ValueError, match=r"train"):
        open_sources(config)
