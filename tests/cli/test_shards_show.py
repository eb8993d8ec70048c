"""`deepstack shards show`: which record is meant, where its page goes, and how a refused one ends."""

from pathlib import Path

import pytest
from small_run import Pages
from tiny_run import run_of

from deepstack_pl.batch import Reason, Record, Refused
from deepstack_pl.cli import shards_show
from deepstack_pl.cli.main import main
from deepstack_pl.cli.shards_show import SPLITS, file_name, find
from deepstack_pl.data import sources as opened

PAGES = ("data.fine_print.train_pages=4", "data.fine_print.val_pages=2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Keyed(Pages):
    """Pages with keys as shards have them."""

    def __init__(self, *keys: str) -> None:
        super().__init__(len(keys))
        self.keys = keys

    def key(self, index: int) -> str:
        return self.keys[index]


class Spoilt(Keyed):
    """The third is no picture."""

    def __getitem__(self, index: int) -> Record:
        if index == 2:
            raise Refused(Reason.image, f"{self.key(2)}.jpg: cannot read this image. Fetch it again.")
        return super().__getitem__(index)

    def stored(self, index: int) -> tuple[bytes, list[bytes]]:
        return b'{"id": "%d", "odd": "\xff"}' % index, [b"\xff\xd8\xff" + bytes(7)]


TRAIN = Keyed(*(f"train/shard-00000{n // 3}.tar:{n:09d}" for n in range(6)))
VAL = Keyed("val/shard-000000.tar:000000000", "val/shard-000000.tar:000000777")
BOTH = {"train": TRAIN, "val": VAL}


def test_a_record_is_shown_by_number_and_by_key_alike(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for which in ("3", "train/shard-000000.tar:000000003", "000000003"):
        assert shards_show.run(run_of(*PAGES), {"which": which, "split": "train"}) == 0
        shown.append(capsys.readouterr().out.partition("\ntrain/")[2])  # the set is written first
    assert len(set(shown)) == 1
    assert shown[0].startswith("shard-000000.tar:000000003\nrecord 3 of 4 in train of fine_print")
    page = Path("outputs/show/train-shard-000000.tar-000000003.html")
    assert str(page) in shown[0]
    assert "Name the colours" in page.read_text(encoding="utf-8")


def test_the_page_goes_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_show.run(run_of(*PAGES), {"which": "1", "split": "val", "html": "a/b.html"}) == 0
    assert "val/shard-000000.tar:000000001" in Path("a/b.html").read_text(encoding="utf-8")
    assert not Path("outputs").exists()


def test_a_refused_record_is_shown_as_it_is_stored_and_ends_in_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = Spoilt(*TRAIN.keys)
    monkeypatch.setattr(opened, "open_sources", lambda config: (spoilt, VAL))
    assert shards_show.run(run_of(), {"which": "2"}) == 1
    shown = capsys.readouterr().out
    assert "REFUSED  train/shard-000000.tar:000000002.jpg: cannot read this image." in shown
    assert '{"id": "2", "odd": "\\xff"}' in shown
    page = Path("outputs/show/train-shard-000000.tar-000000002.html").read_text(encoding="utf-8")
    assert "cannot read this image" in page
    assert "odd" in page


def test_types_and_sizes_of_images_are_those_on_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "open_sources", lambda config: (Spoilt(*TRAIN.keys), VAL))
    assert shards_show.run(run_of(), {"which": "0"}) == 0
    assert "jpg, 10 bytes, 32 x 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("which", "split", "found"),
    [
        ("5", None, ("train", 5)),
        ("1", "val", ("val", 1)),
        ("0", None, ("train", 0)),
        ("train/shard-000001.tar:000000004", None, ("train", 4)),
        ("shard-000001.tar:000000004", None, ("train", 4)),
        ("000000004", None, ("train", 4)),
        ("train/shard-000001.tar:000000004.jpg", None, ("train", 4)),
        ("train/shard-000001.tar:000000004.0.png", None, ("train", 4)),
        ("val/shard-000000.tar:000000777", None, ("val", 1)),
        ("000000777", None, ("val", 1)),
        ("000000000", "val", ("val", 0)),
    ],
)
def test_a_record_is_found_by_all_its_names(which: str, split: str | None, found: tuple[str, int]) -> None:
    name, index, key = find(BOTH, which, split)
    assert (name, index) == found
    assert key == BOTH[name].key(index)


@pytest.mark.parametrize(
    ("which", "split", "says"),
    [
        ("6", None, r"record 6: split=train holds 6 records, 0 to 5\."),
        ("000000777", "train", r"000000777: no record of split=train has this key\. They are like train/"),
        ("0004", None, "0004: no record of split=train and split=val has this key"),
        ("4.tar", None, "no record of"),
    ],
)
def test_a_record_that_is_not_there_is_an_error_that_says_what_is(which: str, split: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find(BOTH, which, split)


def test_the_end_of_several_keys_is_refused_with_the_keys() -> None:
    twice = Keyed("a/s.tar:01", "b/s.tar:01")
    with pytest.raises(ValueError, match=r"01 is the end of 2 keys of split=train: a/s.tar:01, b/s.tar:01\."):
        find({"train": twice, "val": VAL}, "01", None)
    assert find({"train": twice, "val": VAL}, "b/s.tar:01", None)[1] == 1


def test_without_a_record_or_with_an_unknown_split_nothing_is_opened() -> None:
    with pytest.raises(ValueError, match="Which record"):
        shards_show.run(run_of(), {})
    with pytest.raises(ValueError, match="split=test: use train or val"):
        shards_show.run(run_of(), {"which": "1", "split": "test"})


def test_a_key_is_never_a_path() -> None:
    for key in ("../../etc/passwd:1", "/abs", "a\x00b", ".hidden", "a\\b", "..", "", "ä" * 500, "x" * 500):
        name = file_name(key)
        assert name
        assert len(name) <= 120
        assert not name.startswith(".")
        assert not set(name) & set("/\\\0")


def test_both_splits_are_known() -> None:
    assert set(shards_show.OWN) == {"which", "split", "html"}
    assert SPLITS == ("train", "val")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "data=llava665k", "mising=skip"], "Unknown key mising. Did you mean missing?"),
        (["show", "1", "2"], "2: 1 was given already"),
        (["show", "1", "htm=x"], "Did you mean html?"),
    ],
)
def test_a_word_that_the_action_does_not_know_is_refused(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", *words]) == 1
    assert says in capsys.readouterr().err
