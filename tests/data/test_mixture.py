"""Mixtures: what an epoch holds of each source, drawn by seed and epoch alone."""

import io
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serve
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numbered import Numbers
from PIL import Image

from deepstack_pl.data import cache as cache_module
from deepstack_pl.data.config import Batching, DataConfig, MixtureEntry, Remainder, Shuffle, Source
from deepstack_pl.data.mixture import Mixture, name_of, open_mixture, take
from deepstack_pl.data.shards import ShardWriter
from deepstack_pl.data.sources import open_sources
from deepstack_pl.data.stream import Position, Stream


def entry(name: str = "a", **values: object) -> MixtureEntry:
    return MixtureEntry(root=f"folder/{name}", **values)  # type: ignore[arg-type]


def numbers(count: int, name: str = "") -> Numbers:
    source = Numbers(count, f"{count} {name}", name=name)
    source.columns = replace(source.columns, sources=(name,))
    return source


def counts(mixture: Mixture, epoch: int = 0, seed: int = 0) -> Counter[str]:
    """How often each sample is in an epoch, by key."""
    return Counter(mixture.key(int(number)) for number in mixture.numbers(epoch, seed))


def by_entry(found: Counter[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, count in found.items():
        total[key.partition("/")[0]] += count
    return total


def test_repeats_hold_each_sample_so_many_times() -> None:
    mixture = Mixture([numbers(3), numbers(2)], [entry("a", repeat=2), entry("b", repeat=3)])
    assert counts(mixture) == {"a/0": 2, "a/1": 2, "a/2": 2, "b/0": 3, "b/1": 3}
    assert mixture.epoch_samples == 12
    assert len(mixture) == 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.5, 10)), min_size=1, max_size=5), st.integers(0, 3))
def test_weights_share_an_epoch_out_to_the_nearest_sample(parts: list[tuple[int, float]], epoch: int) -> None:
    entries = [entry(f"e{place}", weight=weight) for place, (_, weight) in enumerate(parts)]
    total = sum(count for count, _ in parts)
    shares = [total * weight / sum(weight for _, weight in parts) for _, weight in parts]
    if min(shares) < 1:
        return
    mixture = Mixture([numbers(count, "") for count, _ in parts], entries)
    drawn = Counter(int(number) for number in mixture.numbers(epoch, 0))
    assert drawn.total() == mixture.epoch_samples == total
    begin = 0
    for (count, _), share in zip(parts, shares, strict=True):
        each = [drawn[number] for number in range(begin, begin + count)]
        assert abs(sum(each) - share) < 1
        assert max(each) - min(each) <= 1, "whole passes, and a part of one more"
        begin += count


def test_what_is_left_over_goes_to_the_largest_remainders() -> None:
    mixture = Mixture([numbers(5), numbers(5)], [entry("a", weight=0.36), entry("b", weight=0.64)])
    assert by_entry(counts(mixture)) == {"a": 4, "b": 6}, "3.6 and 6.4"


def test_what_weights_draw_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    mixture = Mixture([numbers(40), numbers(40)], [entry("a", weight=1), entry("b", weight=3)])
    drawn = {(epoch, seed): tuple(mixture.numbers(epoch, seed)) for epoch in range(3) for seed in range(3)}
    assert len(set(drawn.values())) == 9
    assert by_entry(counts(mixture)) == {"a": 20, "b": 60}
    assert tuple(pickle.loads(pickle.dumps(mixture)).numbers(2, 1)) == drawn[2, 1]
    seen = Counter(number for epoch in range(20) for number in mixture.numbers(epoch, 0) if number < 40)
    assert len(seen) == 40, "every sample has its turn"


@pytest.mark.parametrize("weights", [(1e-6, 1.0)])
def test_a_weight_that_draws_nothing_is_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="the weight of a is less than one of 20 samples"):
        Mixture([numbers(10), numbers(10)], [entry("a", weight=weights[0]), entry("b", weight=weights[1])])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", range(20)),
        ("first:3", range(3)),
        ("first:10%", range(2)),
        ("end:3", range(17, 20)),
        ("end:12.5%", range(17, 20)),  # of 2.5 samples, 3: rounded up, as LLaVA-NeXT does
        ("first:100%", range(20)),
    ],
)
def test_a_part_is_taken_as_llava_next_takes_it(asked: str, expected: range) -> None:
    assert take(20, entry(take=asked), "").tolist() == list(expected)


def test_a_random_part_is_fixed_and_holds_no_sample_twice() -> None:
    parts = {tuple(take(100, entry(take="random:30%"), text)) for text in "abab"}
    assert len(parts) == 2
    assert all(len(set(part)) == 30 and list(part) == sorted(part) for part in parts)


@example(500, 322)
@example(1000, 161)
@given(st.integers(1, 700_000), st.integers(1, 1000))
def test_shares_are_exact(n: int, tenths: int) -> None:
    """32.2% of 500 samples are 161, although 500 * 32.2 / 100 is more."""
    found = take(n, entry(take=f"first:{tenths / 10}%"), "")
    assert len(found) == -(-n * tenths // 1000)


@pytest.mark.parametrize("asked", ["first:0", "end:21", "random:0%", "first:101%"])
def test_nothing_or_more_than_there_is_cannot_be_taken(asked: str) -> None:
    with pytest.raises(ValueError, match=rf"take={asked} of folder/a, which holds 20 samples"):
        take(20, entry(take=asked), "")


def test_only_what_is_taken_is_in_the_mixture() -> None:
    """So that nothing else is measured, counted or refused."""
    mixture = Mixture([numbers(10), numbers(4)], [entry("a", take="end:2"), entry("b")])
    assert [mixture.key(number) for number in range(len(mixture))] == ["a/8", "a/9", "b/0", "b/1", "b/2", "b/3"]
    assert len(mixture.columns) == len(mixture) == 6
    assert [mixture[number].key for number in (0, 5)] == ["a/8", "b/3"]
    assert mixture.outline(1).key == "a/9"
    assert mixture.stored(1) == (b"9", [])
    for number in (-1, 6):
        with pytest.raises(IndexError):
            mixture.key(number)


def test_records_and_columns_agree_on_sources_which_begin_with_the_entry() -> None:
    mixture = Mixture([numbers(2, "coco"), numbers(2)], [entry("a"), entry("b")])
    for number in range(4):
        columns = mixture.columns
        assert mixture[number].source == columns.sources[columns.source[number]]
        assert mixture[number].key == mixture.key(number)
    assert mixture.columns.sources == ("a/coco", "b")


def test_a_single_entry_leaves_names_as_they_are() -> None:
    mixture = Mixture([numbers(3, "coco")], [entry(take="end:1")])
    assert (mixture[0].source, mixture.columns.sources, mixture[0].key) == ("coco", ("coco",), "coco2")


def test_entries_of_one_name_are_refused_and_a_name_mends_it() -> None:
    roots = [MixtureEntry(root="one/set"), MixtureEntry(root="other/set/")]
    with pytest.raises(ValueError, match=r"set stands there twice.*a name of its own"):
        Mixture([numbers(1), numbers(2)], roots)
    roots[1].name = "mine"
    assert Mixture([numbers(1), numbers(2)], roots).names == ["set", "mine"]


def test_an_entry_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"root=\. has no name of its own"):
        name_of(MixtureEntry(root="."))
    assert name_of(MixtureEntry(root="https://host/sets/lcs")) == "lcs"


def test_the_fingerprint_changes_with_everything_that_changes_what_is_read() -> None:
    def of(*entries: MixtureEntry, sizes: tuple[int, ...] = (10, 10)) -> str:
        return Mixture([numbers(size) for size in sizes], entries).fingerprint

    a, b = entry("a"), entry("b")
    others = [
        of(a, b),
        of(b, a),
        of(a, b, sizes=(10, 11)),
        of(entry("a", repeat=2), b),
        of(entry("a", take="first:5"), b),
        of(entry("a", take="end:5"), b),
        of(entry("a", weight=1), entry("b", weight=1)),
        of(entry("a", weight=1), entry("b", weight=2)),
    ]
    assert len(set(others)) == len(others)
    assert of(a, b) == of(replace(a, root="elsewhere/a"), b), "data may move"


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("shuffle", Shuffle)
def test_an_epoch_of_the_stream_is_the_mixtures(batching: Batching, shuffle: Shuffle) -> None:
    mixture = Mixture([numbers(9), numbers(20)], [entry("a", weight=2), entry("b", weight=1)])
    config = DataConfig(
        name="mix", batch_size=4, batching=batching, shuffle=shuffle, block=3, window=7, token_budget=12
    )
    stream = Stream(mixture, config, 5, lengths=np.arange(29) % 7, capacity=6)
    for epoch in (0, 1):
        read = [number for units in stream.epoch_batches(epoch) for unit in units for number in unit]
        assert Counter(read) == Counter(mixture.numbers(epoch, 5).tolist())
    assert stream.samples == 29
    later = next(after for _, after in stream.batches(Position()) if after.step == 11)
    assert stream.position(11) == later
    dropping = Stream(mixture, replace(config, remainder=Remainder.drop), 5, lengths=np.arange(29) % 7, capacity=6)
    assert all(() not in units for units in dropping.epoch_batches(1))


def test_what_an_epoch_holds_is_said() -> None:
    mixture = Mixture([numbers(30), numbers(10)], [entry("a", take="first:50%"), entry("b", repeat=2)])
    assert mixture.describe() == (
        "35 samples an epoch of 2 sources; a: 15 an epoch (42.9%) of 15 (first:50%), 30 numbers; "
        "b: 20 an epoch (57.1%) of 10, 10 numbers"
    )


def write(folder: Path, count: int) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    for split in ("train", "val"):
        with ShardWriter(folder / split, max_samples=3) as writer:
            for number in range(count):
                writer.write(
                    {"id": str(number), "image": f"coco/{number}.png", "conversations": turns}, [buffer.getvalue()]
                )


def test_local_and_remote_folders_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cache_module, "RESERVE", 0)
    write(tmp_path / "near", 4)
    write(tmp_path / "far", 5)
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in (tmp_path / "far").rglob("*.*")}
    with serve({**files, **{f"other/{name.partition('/')[2]}": data for name, data in files.items()}}) as server:
        entries = [
            MixtureEntry(root=str(tmp_path / "near"), repeat=2),
            MixtureEntry(root=f"{server.url}/far"),
            MixtureEntry(root=f"{server.url}/other", take="random:2"),
        ]
        config = DataConfig(
            name="mix", source=Source.shards, root=str(tmp_path), mixture=entries, cache=str(tmp_path / "cache")
        )
        train, val = open_sources(config)
        assert isinstance(train, Mixture)
        assert len(train) == 11
        assert by_entry(counts(train)) == {"near": 8, "far": 5, "other": 2}
        assert {train[number].source for number in range(11)} == {"near/coco", "far/coco", "other/coco"}
        assert set(train.parts()) >= {"near/train/shard-000000.tar", "far/train/shard-000001.tar"}
        assert len(val) == 4, "the first entry's, where data.root has none"
        size = sum(len(data) for name, data in files.items() if name.startswith("far/train/") and name.endswith(".tar"))
        config.cache_gb = size * 1.5 / 1e9
        with pytest.raises(ValueError, match=r"4 shards of .* data\.shuffle=full nearly every sample would fetch"):
            open_mixture(config)
