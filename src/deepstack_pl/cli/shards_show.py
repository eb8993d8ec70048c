"""``deepstack shards show N|KEY``: one record as the model will see it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deepstack_pl.config.run import RunConfig

if TYPE_CHECKING:
    from deepstack_pl.data.sources import Source
    from deepstack_pl.inspection.sample_words import Stored

HELP = "one record as the model will see it: views, groups, tokens and labels, on the terminal and as a page"
EXAMPLE = "deepstack shards show 12 data=llava665k data.root=DIR llm=phi3 llm.init=random model=deepstack_l"
OWN = {
    "which": "the record: its number in the split (12), or its key as messages print it; `which=` may be left out",
    "split": "train or val; default: train, or wherever the key is",
    "html": "where the page is written; default outputs/show/KEY.html",
}
SPLITS = ("train", "val")
_PIPE = 100  # columns where there is no terminal
_NAME = 120  # characters of a key in the page's name


class Keyed(Protocol):
    """What records are found by."""

    def __len__(self) -> int: ...

    def key(self, index: int, /) -> str: ...


def run(run: RunConfig, own: dict[str, str]) -> int:
    """Show the record; 0, or 1 where it is refused.

    Raises:
        ValueError: there is no such record, or the data or the configuration is not at hand.
    """
    which, wanted = own.get("which", ""), own.get("split")
    if not which:
        raise ValueError(f"Which record? Give its number or its key: {EXAMPLE}.")
    if wanted not in (None, *SPLITS):
        raise ValueError(f"split={wanted}: use {' or '.join(SPLITS)}.")

    from rich.console import Console

    from deepstack_pl.batch import Refused
    from deepstack_pl.cli.assemble import make_processor, settle
    from deepstack_pl.cli.checks import check_vocabulary
    from deepstack_pl.cli.folders import OUTPUTS, relative
    from deepstack_pl.data.sources import open_sources
    from deepstack_pl.files import write_text
    from deepstack_pl.inspection.anatomy import dissect
    from deepstack_pl.inspection.sample_page import refusal_page, sample_page
    from deepstack_pl.inspection.sample_text import print_refusal, print_sample
    from deepstack_pl.inspection.sample_words import safe

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_PIPE)
    notes = settle(run)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    processor = make_processor(run)
    check_vocabulary(run, processor)
    sources: dict[str, Source] = dict(zip(SPLITS, open_sources(run.data), strict=True))
    split, index, key = find(sources, which, wanted)
    source = sources[split]
    title = f"record {index:,} of {len(source):,} in {split} of {run.data.name}"
    stored = stored_of(source, index)
    page = Path(own["html"]) if own.get("html") else OUTPUTS / "show" / f"{file_name(key)}.html"
    try:
        anatomy = dissect(processor, source[index])
    except Refused as refused:
        print_refusal(console, key, refused.sentence, stored, title)
        text, status = refusal_page(key, refused.sentence, stored, title), 1
    else:
        print_sample(console, anatomy, stored, title)
        text, status = sample_page(anatomy, stored, title, notes), 0
    write_text(page, text)
    console.print(f"\npage: {safe(relative(page))}", markup=False, soft_wrap=True)
    return status


def find(sources: Mapping[str, Keyed], which: str, split: str | None) -> tuple[str, int, str]:
    """The split, the number in it and the whole key of the record that ``which`` names.

    Digits without leading zeros are a number; anything else is a key, whole or its end (``shard-000000.tar:000000012``,
    ``000000012``), with the extension that messages about images add or without.

    Raises:
        ValueError: there is none, or more than one.
    """
    if re.fullmatch(r"0|[1-9][0-9]*", which):
        name = split or SPLITS[0]
        source = sources[name]
        if int(which) >= len(source):
            raise ValueError(
                f"record {which}: split={name} holds {len(source):,} records, 0 to {len(source) - 1:,}. A key has "
                "leading zeros: 000000012."
            )
        return name, int(which), source.key(int(which))
    for spelt in dict.fromkeys((which, re.sub(r"(:[^:./]+)\.[^:/]*$", r"\1", which))):
        found = {name: _matches(source, spelt) for name, source in sources.items() if split in (None, name)}
        for name, indices in found.items():
            source = sources[name]
            if len(indices) > 1:
                keys = ", ".join(source.key(index) for index in indices[:3])
                raise ValueError(
                    f"{which} is the end of {len(indices):,} keys of split={name}: {keys}{', ...' * (len(indices) > 3)}"
                    ". Write the whole key, or the record's number."
                )
            if indices:
                return name, indices[0], source.key(indices[0])
    where = f"split={split}" if split else " and ".join(f"split={name}" for name in sources)
    raise ValueError(
        f"{which}: no record of {where} has this key. They are like {sources[split or SPLITS[0]].key(0)}; a number "
        "from 0 on is the record's place in the split."
    )


def stored_of(source: "Source", index: int) -> "Stored":
    """What lies on disk."""
    from deepstack_pl.inspection.sample_words import Stored
    from deepstack_pl.vision.images import sniff

    record, images = source.stored(index)
    lines = tuple(f"{sniff(data) or 'of no known type'}, {len(data):,} bytes" for data in images)
    return Stored(record.decode("utf-8", "backslashreplace"), lines)


def file_name(key: str) -> str:
    """``key`` as the name of a file in any folder: a key is never a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-")[-_NAME:] or "record"


def _matches(source: Keyed, which: str) -> list[int]:
    ends = (f":{which}", f"/{which}")
    keys = ((index, source.key(index)) for index in range(len(source)))
    return [index for index, key in keys if key == which or key.endswith(ends)]
