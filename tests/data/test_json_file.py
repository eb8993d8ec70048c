"""LLaVA's JSON file, record by record: the same records as the whole file at once, each with its own bytes."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_pl.batch import Refused
from deepstack_pl.data.json_file import JsonList

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
RECORDS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT, max_size=3), max_size=4), min_size=1)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.booleans(), st.sampled_from([None, 1, "\t"]), st.integers(1, 40), st.booleans())
def test_records_and_their_bytes_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict],
    ascii_only: bool,
    indent: int | str | None,
    chunk: int,
    marked: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    text = f" {json.dumps(records, ensure_ascii=ascii_only, indent=indent)}\n"
    path.write_text(text, encoding="utf-8-sig" if marked else "utf-8", newline="")
    data = path.read_bytes()
    listed = JsonList(path, chunk)
    rows = list(listed)
    assert [row.values for row in rows] == records
    assert [json.loads(data[row.start : row.start + row.size]) for row in rows] == records
    assert listed.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "starts with ''"),
        (b"[]", "it is empty"),
        (b"{}", "starts with '{'"),
        (b'[{"a": 1}', "it is cut off"),
        (b'[{"a": 1},', r"is no JSON \(record 1, about byte 10: Expecting value"),
        (b'[{"a": 1},]', "a comma after record 0, and then nothing"),
        (b'[{"a": "b', r"is no JSON \(record 0, about byte"),
        (b'[{"a": 1} {"b": 2}]', "'{' after record 0"),
        (b'[{"a": 1}] x', "'x' after its end"),
        (b'[{"a": 1}, 3]', "record 1 is '3'"),
        (b'[{"a": tru}]', r"is no JSON \(record 0"),
        (b'[{"a": "\xff"}]', "it is not UTF-8"),
        ('[{"a": "ü"}]'.encode("utf-16"), "it is not UTF-8"),
        (b'[{"a": "\x01"}]', r"is no JSON \(record 0.*control character"),
        (b'[{"a": 1}]\n[{"a": 1}]', r"'\[' after its end"),
        (b'{"a": 1}\n{"b": 2}\n', "starts with '{'"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_with_the_place(
    tmp_path: Path, data: bytes, message: str, chunk: int
) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list(JsonList(tmp_path / "x.json", chunk))
    assert str(error.value).startswith(f"data.path={tmp_path / 'x.json'} is no")
    assert "LLaVA's format is" in str(error.value)


def test_records_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"a": ' + b"[" * 10**5)
    with pytest.raises(ValueError, match="record 0 is nested too deep"):
        list(JsonList(tmp_path / "x.json"))


def test_damage_early_in_a_file_is_found_without_reading_the_rest(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}, {"b": ?}, ' + b" " * 10**6 + b"]")
    listed = JsonList(tmp_path / "x.json", chunk=1000)
    with pytest.raises(ValueError, match="record 1"):
        list(listed)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_does_not_know_is_refused_in_its_record_alone(tmp_path: Path, word: str) -> None:
    (tmp_path / "x.json").write_text(f'[{{"a": 1}}, {{"a": {word}}}, {{"a": "{word}"}}]')
    rows = list(JsonList(tmp_path / "x.json", chunk=4))
    rows[0].check("k")
    rows[2].check("k")
    with pytest.raises(Refused, match=f"^k: holds {word}, which is no JSON"):
        rows[1].check("k")
