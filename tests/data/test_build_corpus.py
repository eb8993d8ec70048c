"""Corpora into shards: everything that can be taken, verbatim; everything else named; no image in both parts."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from builds import SKIP, SMALL, built, config_of, large, rows_of, tars
from replicas import JSON, Replica, huge, jpeg, picture, said, write_replica
from rich.console import Console

from deepstack_pl.batch import Reason
from deepstack_pl.data import build as building
from deepstack_pl.data.build import How, build
from deepstack_pl.data.build_report import show
from deepstack_pl.data.config import ExpectedConfig, OnMissing
from deepstack_pl.data.corpora import CorpusFiles, survey
from deepstack_pl.data.shard_jobs import Job, Written
from deepstack_pl.data.shard_writers import write_all
from deepstack_pl.data.shards import check_finished
from deepstack_pl.data.sources import ShardSource, open_sources

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Replica:
    return write_replica("llava665k", tmp_path_factory.mktemp("mix"))


@pytest.mark.parametrize("name", JSON)
def test_every_record_of_a_corpus_is_taken_or_named(name: str, tmp_path: Path) -> None:
    replica = write_replica(name, tmp_path)
    report = built(replica, tmp_path / "out")
    assert report.whole
    assert {line.row: line.reason for line in report.left_out} == {r: why.name for r, why in replica.refused.items()}
    train, val = (ShardSource(tmp_path / "out" / split, name) for split in ("train", "val"))
    good = [row for row in range(len(replica.records)) if row not in replica.refused]
    assert sorted(rows_of(train) + rows_of(val)) == good
    assert report.taken == Counter(replica.source(row) for row in good)
    for source in (train, val):
        for i, row in enumerate(rows_of(source)):
            record = source[i]
            assert record.source == replica.source(row)
            assert len(record.images) == (1 if replica.records[row].get("image") else 0)
            assert source.outline(i).turns == record.turns


def test_the_report_has_a_line_for_every_record_that_is_left_out(mix: Replica, tmp_path: Path) -> None:
    built(mix, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == sorted(mix.refused)
    assert all(line["sentence"].startswith(f"llava_v1_5_mix665k.json:{line['row']}") for line in lines)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["left_out"] == Counter(line["reason"] for line in lines)
    assert set(manifest["left_out"]) == {"conversation", "image", "missing"}
    assert manifest["records"] == len(mix.records)
    assert manifest["repeated_placeholders"] == manifest["leading_answers"] == manifest["unanswered_questions"] == 1
    assert sum(split["samples"] for split in manifest["splits"].values()) == len(mix.records) - len(lines)


def test_records_and_images_are_stored_verbatim_under_what_the_bytes_are(mix: Replica, tmp_path: Path) -> None:
    built(mix, tmp_path / "out")
    text = mix.json.read_text("utf-8-sig")
    kinds: Counter[str] = Counter()
    for split in ("train", "val"):
        source = ShardSource(tmp_path / "out" / split)
        for i, row in enumerate(rows_of(source)):
            shard, sample = source._place(i)
            members = shard.members(sample)
            stored = {kind: source._read(shard, member, "") for kind, member in members.items()}
            json_bytes = stored.pop("json")
            assert json_bytes.decode() in text
            assert json.loads(json_bytes) == mix.records[row]
            for kind, data in stored.items():
                kinds[kind] += 1
                assert data == (mix.images / mix.records[row]["image"]).read_bytes()
    assert {"png", "gif", "webp", "jpg"} == set(kinds)  # though every name says .jpg


def test_error_builds_nothing_and_lists_every_reason(mix: Replica, tmp_path: Path) -> None:
    report = built(mix, tmp_path / "out", How())
    assert not report.whole
    assert not (tmp_path / "out").exists()
    rows = [json.loads(line)["row"] for line in (tmp_path / "out.left_out.jsonl").read_text().splitlines()]
    assert rows == [line.row for line in report.left_out]
    known = {row: why.name for row, why in mix.refused.items() if why is not Reason.image}
    assert {line.row: line.reason for line in report.left_out} == known


def test_an_image_that_cannot_be_decoded_leaves_nothing_that_looks_like_a_set(tmp_path: Path) -> None:
    replica = large(tmp_path)
    bad = [replica.images / replica.records[row]["image"] for row in (0, 20)]
    whole = [path.read_bytes() for path in bad]
    for path, data in zip(bad, whole, strict=True):
        path.write_bytes(data[:1500])
    report = built(replica, tmp_path / "out", How(max_bytes=100_000))
    assert (report.whole, {line.reason for line in report.left_out}) == (False, {"image"})
    assert {0, 20} <= {line.row for line in report.left_out}  # all of them, not the first
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(ValueError, match=r"holds no finished shards of llava665k"):
        open_sources(config_of(replica, shards=str(tmp_path / "out")))
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="samples are missing"):
            check_finished(tmp_path / "out" / split)
    left = tars(tmp_path / "out")
    without = built(replica, tmp_path / "out", SMALL)
    assert without.kept == len(left)
    fresh = tars(built(replica, tmp_path / "without", SMALL).out)
    assert tars(without.out) == fresh
    assert left.items() <= fresh.items()
    for path, data in zip(bad, whole, strict=True):
        path.write_bytes(data)
    again = built(replica, tmp_path / "out", How(max_bytes=100_000))
    assert again.whole
    assert again.kept
    assert tars(tmp_path / "out") == tars(built(replica, tmp_path / "fresh", SMALL).out)


def test_decode_false_reads_headers_alone(tmp_path: Path) -> None:
    replica = write_replica("llava665k", tmp_path)
    report = built(replica, tmp_path / "out", How(missing=OnMissing.skip, decode=False))
    cut = [row for row, record in enumerate(replica.records) if "It is cut off." in str(record)]
    seen = {line.row for line in report.left_out}
    assert seen == set(replica.refused) - set(cut)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "images/0.jpg").mkdir(parents=True)
    for image in range(1, 4):
        (tmp_path / f"images/{image}.jpg").write_bytes(jpeg(picture(image)))
    (tmp_path / "my.json").write_text(json.dumps([said("<image>", "a", image=f"{i}.jpg") for i in range(4)]))
    report = build(CorpusFiles("my", tmp_path / "my.json", tmp_path / "images"), tmp_path / "out", How())
    assert [(line.row, line.reason) for line in report.left_out] == [(0, "missing")]


def test_a_corpus_of_which_nothing_can_be_taken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text(json.dumps([said("<image>", "a", image=f"{number}.jpg") for number in range(4)]))
    (tmp_path / "images").mkdir()
    files = CorpusFiles("mine", path, tmp_path / "images")
    with pytest.raises(ValueError, match=r"no record can be taken for train \(4 missing\)\. Fetch what is missing"):
        build(files, tmp_path / "out", SKIP)
    for number in range(4):
        (tmp_path / f"images/{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"no record of train could be taken \(4 image\)\. Nothing is built"):
        build(files, tmp_path / "out", SKIP)
    assert not tars(tmp_path / "out")


def test_no_image_is_in_training_and_in_validation(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for image in range(5):
        (tmp_path / f"images/{image}.jpg").write_bytes(jpeg(picture(image)))
    names = [f"{'./' * (row % 2)}{row % 5}.jpg" for row in range(20)]
    (tmp_path / "my.json").write_text(json.dumps([said("<image>", "a", image=name) for name in names]))
    build(CorpusFiles("my", tmp_path / "my.json", tmp_path / "images"), tmp_path / "out", How(val_samples=8))
    shown = [{row % 5 for row in rows_of(ShardSource(tmp_path / "out" / split))} for split in ("train", "val")]
    assert not shown[0] & shown[1]
    assert [len(images) for images in shown] == [3, 2]


def test_the_presets_expect_what_is_published() -> None:
    totals = {
        "lcs558k": (558_128, 0, 0),
        "sharegpt4v_pt": (1_246_901, 0, 118_287 + 558_128 + 570_486),
        "llava665k": (665_298, 40_688, 665_298 - 40_688),
    }
    for name, (records, text_only, by_source) in totals.items():
        values = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())["expected"]
        assert (values["records"], values.get("text_only")) == (records, text_only)
        assert sum(values.get("sources", {}).values()) in (by_source, records)


def corpus(root: Path, records: list[dict], name: str = "my", damaged: dict[str, bytes] | None = None) -> CorpusFiles:
    """Records of images that are there, but for those that are ``damaged``."""
    for number, record in enumerate(records):
        if "image" in record:
            file = root / "images" / record["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((damaged or {}).get(record["image"], jpeg(picture(number))))
    (root / f"{name}.json").write_text(json.dumps(records))
    return CorpusFiles(name, root / f"{name}.json", root / "images")


def test_records_without_an_image_are_counted_by_themselves(tmp_path: Path) -> None:
    """Neither a corpus nor a folder that is called text is without images."""
    records = [said("<image>", "a", image=f"{place}{n}.jpg") for place in ("", "text/") for n in range(4)]
    files = corpus(tmp_path, [*records, *(said(f"{n}?", "a") for n in range(3))], name="text")
    report = build(files, tmp_path / "out", How())
    assert (report.survey.text_only, report.text_only) == (3, 3)
    console = Console(record=True, width=200)
    show(report, "text", ExpectedConfig(text_only=3), console)
    (line,) = (line for line in console.export_text().splitlines() if "without an image" in line)
    assert [cell.strip() for cell in line.split("│")[2:6]] == ["3", "3", "3", "as published"]


def test_kind_and_facts_are_checked_before_any_image_is_decoded(tmp_path: Path) -> None:
    records = [{**said("<image>", "a", image=f"{n}.jpg"), "facts": ["a"]} for n in range(4)]
    records[2]["facts"] = "a"
    report = build(corpus(tmp_path, records), tmp_path / "out", How(decode=False))
    assert [(line.row, line.reason) for line in report.left_out] == [(2, "conversation")]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("decode", [True, False])
def test_what_is_too_large_is_said_to_be_too_large(tmp_path: Path, decode: bool) -> None:
    records = [said("<image>", "a", image=f"{n}.png") for n in range(4)]
    files = corpus(tmp_path, records, damaged={"1.png": huge()})
    report = build(files, tmp_path / "out", How(missing=OnMissing.skip, decode=decode))
    assert ["at most 64,000,000" in line.sentence for line in report.left_out] == [True]


def test_what_is_held_out_does_not_depend_on_what_is_missing(tmp_path: Path) -> None:
    """Also where records hang together only by an image that is not there."""
    pairs = [said("<image>", "a", image=f"{n // 2}.jpg") for n in range(24)]
    chain = [{**said("<image><image>", "a"), "image": [f"{n}.jpg", f"{n + 1}.jpg"]} for n in range(0, 12, 3)]
    files = corpus(tmp_path, pairs)
    files.json.write_text(json.dumps([*pairs, *chain]))
    whole = survey(files, 6).found
    for number in (1, 4, 7, 10):
        (tmp_path / f"images/{number}.jpg").unlink()
    less = survey(files, 6)
    gone = {line.row for line in less.left_out}
    assert len(gone) == 4 * 3
    for split, found in whole.items():
        assert {record.row for record in less.found[split]} == {record.row for record in found} - gone


def test_an_image_that_goes_meanwhile_is_named_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = corpus(tmp_path, [said("<image>", "a", image=f"{n}.jpg") for n in range(8)])

    def lose(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Written]]:
        (tmp_path / "images/3.jpg").unlink()
        return write_all(jobs, processes)

    monkeypatch.setattr(building, "write_all", lose)
    report = build(files, tmp_path / "out", SKIP)
    (line,) = report.left_out
    assert (line.row, line.reason) == (3, "missing")
    assert "was there and is gone" in line.sentence
    assert report.taken.total() == 7
