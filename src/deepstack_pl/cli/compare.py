"""``deepstack compare A B``: two models on the same questions, sample by sample, as a page with the pictures."""

import argparse
import base64
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepstack_pl.cli.folders import CONFIG, LATEST, newest, relative
from deepstack_pl.cli.report import share
from deepstack_pl.evaluation.config import FOLDER, HELD_OUT
from deepstack_pl.files import write_text

if TYPE_CHECKING:
    from PIL import Image

    from deepstack_pl.evaluation.scored import Answered, Pair, Row, Scored

HELP = "two evaluated runs, sample by sample: differences, and what flipped"
_SIDE = 900  # pixels of a picture's longer side in the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Compares what two runs answered in training's last evaluation and by evaluate.py: paired differences with "
        "intervals and p-values, and the samples where one is better, with their pictures. A and B are runs' folders, "
        "or those of one evaluation each (RUN/evaluation/textvqa)."
    )
    parser.epilog = "example: deepstack compare outputs/A outputs/B"
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument("--show", type=int, default=25, metavar="N", help="samples each way with pictures; default: 25")
    parser.add_argument("--to", type=Path, metavar="DIR", help="default: compare/ in A's folder")


def run(args: argparse.Namespace) -> int:
    """Compare, print and write the page; the exit status.

    Raises:
        ValueError: there is nothing that both answered.
    """
    from jinja2 import Environment, PackageLoader
    from rich.console import Console

    if args.show < 0:
        raise ValueError(f"--show {args.show}: so many samples, 0 or more.")
    a, b = (newest() if folder.absolute() == LATEST.absolute() else folder for folder in (args.a, args.b))
    pairs, notes = _pairs(a, b)
    console = Console(soft_wrap=True, highlight=False)
    shown = [_shown(each, args.show) for each in pairs]
    for each, page in zip(pairs, shown, strict=True):
        console.print(_table(each))
        for line in page["notes"]:
            console.print(line, markup=False)
    for line in notes:
        console.print(line, markup=False)
    folder = args.to or a / "compare"
    names = [_slug(each) for each in (a, b)]
    if len(set(names)) == 1:
        names = ["_".join(each.resolve().parts[-2:]) for each in (a, b)]
    file = folder / f"{'--'.join(names)}.html"
    pages = Environment(loader=PackageLoader("deepstack_pl.cli", "pages"), autoescape=True)
    text = pages.get_template("compare.html").render(a=relative(a), b=relative(b), pairs=shown, notes=notes)
    write_text(file, text)
    console.print(f"page: {relative(file)}", markup=False)
    return 0


def _pairs(a: Path, b: Path) -> "tuple[list[Pair], list[str]]":
    """All that both answered, and a sentence for what one alone did."""
    from deepstack_pl.evaluation.scored import pair

    ours, theirs = _answered(a), _answered(b)
    if _of_one(a) and _of_one(b):  # whatever they are called
        ours, theirs = ({"": each} for each in (*ours.values(), *theirs.values()))
    both = [name for name in ours if name in theirs]
    notes = [f"not compared: {name}, which {a} alone answered" for name in ours if name not in theirs]
    notes += [f"not compared: {name}, which {b} alone answered" for name in theirs if name not in ours]
    if not both:
        raise ValueError(
            f"nothing to compare: {a} answered {', '.join(ours) or 'nothing'}, {b} {', '.join(theirs) or 'nothing'}. "
            "Ask both the same: python evaluate.py ckpt=RUN 'evaluation=[...]'."
        )
    return [pair(ours[name], theirs[name]) for name in both], notes


def _answered(folder: Path) -> "dict[str, Answered]":
    """By name, what was answered in ``folder``: a run's, or that of one evaluation."""
    from deepstack_pl.evaluation.scored import PREDICTIONS, RECORDS, read_answered

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give a run's, or that of one of its evaluations.")
    if _of_one(folder):
        found = read_answered(folder)
        return {found.name: found}
    places = {HELD_OUT: folder} if (folder / PREDICTIONS).is_file() else {}
    for place in sorted((folder / FOLDER).glob("*")):
        if (place / RECORDS).is_file() or (place / PREDICTIONS).is_file():
            places.setdefault(place.name, place)
    return {name: read_answered(place) for name, place in places.items()}


def _of_one(folder: Path) -> bool:
    """Whether ``folder`` is that of one evaluation, and not a run's."""
    from deepstack_pl.evaluation.scored import PREDICTIONS, RECORDS

    there = [name for name in (RECORDS, PREDICTIONS) if (folder / name).is_file()]
    return bool(there) and not (folder / CONFIG).is_file()


def _table(pair: "Pair") -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(pair.ours.name))
    for name in ("", "A", "B", "A - B", "p", "A better", "B better"):
        table.add_column(name, justify="right" if name else "left")
    for row in pair.rows:
        table.add_row(*(escape(cell) for cell in cells(row)), *_counts(pair, row.kind))
    return table


def cells(row: "Row") -> list[str]:
    """A row of the table: kind, means, difference with its interval, p."""
    found = row.difference
    p = "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"
    apart = f"{found.delta:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return [row.kind, share(row.ours), share(row.theirs), apart, p]


def _counts(pair: "Pair", kind: str) -> tuple[str, str]:
    every = kind == pair.rows[0].kind
    return (
        f"{sum(every or ours.kind == kind for ours, _ in pair.better):,}",
        f"{sum(every or ours.kind == kind for ours, _ in pair.worse):,}",
    )


def _shown(pair: "Pair", show: int) -> dict[str, Any]:
    """What the page says of one test."""
    pictures = _Pictures(pair.ours)
    flips = {
        "A is better": [_flip(each, pictures) for each in pair.better[:show]],
        "B is better": [_flip(each, pictures) for each in pair.worse[:show]],
    }
    # Of unlike questions the benchmark's own numbers would not be the table's.
    same = pair.ours.lines.keys() == pair.theirs.lines.keys()
    headlines = [each.headline for each in (pair.ours, pair.theirs) if each.headline is not None and same]
    numbers = " and ".join(f"{value:.3f}" for _, value in headlines)
    return {
        "name": pair.ours.name,
        "rows": [[*cells(row), *_counts(pair, row.kind)] for row in pair.rows],
        "headline": f"{headlines[0][0]}: {numbers}" if headlines else "",
        "samples": len(pair.better) + len(pair.worse) + pair.same,
        "same": pair.same,
        "left": {"A is better": len(pair.better), "B is better": len(pair.worse)},
        "flips": flips,
        "notes": [*pair.notes, *pictures.notes],
    }


def _flip(both: "tuple[Scored, Scored]", pictures: "_Pictures") -> dict[str, Any]:
    ours, theirs = both
    return {
        "key": ours.key,
        "kind": ours.kind,
        "prompt": ours.prompt,
        "answers": sorted(set(ours.answers)),
        "a": (ours.prediction, ours.right / ours.of),
        "b": (theirs.prediction, theirs.right / theirs.of),
        "picture": pictures.of(ours),
    }


class _Pictures:
    """The pictures of what was asked, as data URIs; those that cannot be shown are counted."""

    def __init__(self, answered: "Answered") -> None:
        self._its, self._source, self._asked, self._failed = answered, None, 0, list[str]()

    @property
    def notes(self) -> list[str]:
        if not self._failed:
            return []
        return [f"{len(self._failed)} of {self._asked} pictures cannot be shown. {self._failed[0]}"]

    def of(self, line: "Scored") -> str | None:
        from deepstack_pl.batch import Refused

        self._asked += 1
        try:
            picture = self._read(line)
        except (Refused, OSError, ValueError) as error:
            self._failed.append(str(error))
            return None
        if picture is None:
            return None
        picture.thumbnail((_SIDE, _SIDE))
        data = BytesIO()
        picture.save(data, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"

    def _read(self, line: "Scored") -> "Image.Image | None":
        from deepstack_pl.vision.images import decode_image

        facts = self._its.facts
        if "root" in facts:
            folder = (Path(facts["root"]) / facts["task"]["images"]).absolute()
            file = folder / line.picture
            if not file.is_file() or not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
                raise ValueError(f"{file}: no file of the benchmark's pictures. Evaluate again where they lie now.")
            return decode_image(file.read_bytes(), str(file))
        if self._source is None:
            from deepstack_pl.config.load import load
            from deepstack_pl.data.sources import open_sources

            self._source = open_sources(load(self._config(), []).data)[1]
        images = self._source[line.index].images
        return images[0].copy() if images else None

    def _config(self) -> Path:
        """The config.yaml of the run whose own samples were asked."""
        folder = self._its.folder
        places = [folder, *folder.parents[:2], Path(self._its.facts.get("ckpt", ""))]
        for place in places:
            if (place / CONFIG).is_file():
                return place / CONFIG
        raise ValueError(f"{folder}: the config.yaml of its run is not found. Name the run's own folder as A.")


def _slug(folder: Path) -> str:
    return "_".join(folder.resolve().parts[-1:] if folder.parent.name != FOLDER else folder.resolve().parts[-3:])
