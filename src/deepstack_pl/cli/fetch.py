"""``deepstack fetch NAME...``: weights and corpora from the Hugging Face hub, to where runs look for them.

No file is fetched before it is known that the hub answers, lets us in, and that the disk holds it all. A
connection that breaks is taken up at the same byte; after a Ctrl-C files that came whole are kept.
"""

import argparse
import difflib
import errno
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deepstack_pl.cli.catalogue import OPEN_CLIP, UNKNOWN, Entry, catalogue

HELP = "weights and corpora from the Hugging Face hub; --list says which"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description = (
        "Fetches weights into the Hugging Face cache, where runs find them, and corpora into data/, laid out as "
        "data/README.md says. The same command goes on where it was interrupted, file by file."
    )
    parser.epilog = "example: deepstack fetch phi3 clip_l_336 lcs558k"
    parser.add_argument("names", metavar="NAME", nargs="*", help="names of --list")
    parser.add_argument("--to", metavar="FOLDER", help="weights: FOLDER/NAME; corpora: FOLDER is their data.root")
    parser.add_argument("--list", action="store_true", help="what there is: sizes, licences, places; needs no network")


@dataclass(frozen=True, slots=True)
class Job:
    """An entry, the files of it that the hub has, and the bytes that have yet to be written."""

    entry: Entry
    files: tuple[str, ...]
    needed: int


def run(args: argparse.Namespace) -> int:
    """Fetch; the exit status.

    Raises:
        ValueError: an unknown name, no network, a closed repository, or too little disk; nothing was fetched then.
    """
    from deepstack_pl.cli.compose import conf_folder

    known = catalogue(conf_folder())
    if args.list:
        print_list(known, args.to)
        return 0
    if not args.names:
        raise ValueError("deepstack fetch: name what to fetch, or say --list.")
    for name in args.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"deepstack fetch {name}: no such name.{f' Did you mean {near[0]}?' if near else ''} --list has all."
            )
    require_online()
    jobs = [look_up(known[name], args.to) for name in dict.fromkeys(args.names)]
    require_space(jobs, args.to)
    for job in jobs:
        fetch(job, args.to)
    return 0


def require_online() -> None:
    """Refuse at once where the hub may not be asked.

    Raises:
        ValueError: offline mode is on.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "HF_HUB_OFFLINE is set: nothing can be fetched. Unset it where there is a network; --list needs none."
        )


def look_up(entry: Entry, to: str | None) -> Job:
    """Ask the hub what there is of ``entry``; no file of it is fetched.

    Raises:
        ValueError: it does not answer, does not let us in, or has no such files.
    """
    for weights in (entry.weights, entry.otherwise):
        listed = _ask(entry, to, [*weights, *entry.beside])
        if any(fnmatch(file.filename, pattern) for file in listed for pattern in weights):
            needed = sum(file.file_size or 0 for file in listed if file.will_download)
            if entry.unpack:  # pictures are as large in their archive as beside it
                unpacked = _size_of(_root(to) / entry.unpack[1])
                needed += sum(max(0, (f.file_size or 0) - unpacked) for f in listed if f.filename == entry.unpack[0])
            return Job(entry, tuple(sorted(file.filename for file in listed)), needed)
    wanted = ", ".join((*entry.weights, *entry.otherwise))
    raise ValueError(f"{entry.name}: {_page(entry)} has no {wanted}. See what it has, and fetch it by `hf download`.")


def require_space(jobs: Sequence[Job], to: str | None) -> None:
    """Refuse what a disk does not hold, all of it together.

    Raises:
        ValueError: with both numbers.
    """
    on: dict[int, list[Job]] = {}
    for job in jobs:
        on.setdefault(_disk(job.entry, to)[1], []).append(job)
    for together in on.values():
        there, needed = _disk(together[0].entry, to)[0], sum(job.needed for job in together)
        free = shutil.disk_usage(there).free
        if needed > free:
            raise ValueError(
                f"{', '.join(job.entry.name for job in together)}: {_gb(needed)} are needed on the disk of {there}, "
                f"where {_gb(free)} are free. Name a folder on a larger one: --to FOLDER, or HF_HOME for the hub's "
                "cache."
            )


def fetch(job: Job, to: str | None) -> None:
    """Bring the files, unpack what is packed, and say what comes next."""
    from huggingface_hub import snapshot_download

    entry, root = job.entry, _root(to)
    print(f"{entry.name}: {_gb(job.needed)} to write, from {_page(entry)}; licence: {entry.licence}")
    with _said(entry):
        folder = Path(snapshot_download(entry.repo, **_where(entry, to), allow_patterns=list(job.files)))
    print(f"{entry.name}: in {folder}")
    if entry.unpack:
        archive, images = folder / entry.unpack[0], root / entry.unpack[1]
        unpack(archive, images)
        print(f"{entry.name}: images in {images}; {archive} is read again only by the same fetch")
    if entry.by_hand:
        print(f"{entry.name}: its images are not on the hub. Put them under {root}/:")
        for place, source, gigabytes in entry.by_hand:
            print(f"  {place}: {source} (about {gigabytes} GB)")
    place = _typed(folder if to else entry.repo)
    print(f"then: {entry.then.format(root=_typed(root), place=place)}{_pointing(entry, folder) if to else ''}")


def unpack(archive: Path, folder: Path) -> None:
    """Every file of ``archive`` into ``folder``; those that are there whole stay.

    Raises:
        ValueError: it is no archive, damaged, larger than the disk, or a name in it leaves the folder.
    """
    from deepstack_pl.data.progress import bar

    try:
        with zipfile.ZipFile(archive) as packed, bar(f"Unpacking {archive.name}", len(packed.infolist())) as advance:
            members = packed.infolist()
            outside = [m.filename for m in members if m.filename.startswith("/") or ".." in m.filename.split("/")]
            if outside:
                raise ValueError(f"{archive}: {outside[0]!r} leaves the folder. It is not unpacked; fetch another.")
            missing = [m for m in members if not m.is_dir() and not _there(folder / m.filename, m.file_size)]
            # No member gives more bytes than it says: zipfile stops there, and compares the CRC-32.
            needed, free = sum(member.file_size for member in missing), shutil.disk_usage(archive.parent).free
            if needed > free:
                raise ValueError(f"{archive}: {_gb(needed)} would be unpacked, and {_gb(free)} are free.")
            advance(len(members) - len(missing))
            for member in missing:
                packed.extract(member, folder)
                advance(1)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}). Delete it, and fetch again.") from error


def print_list(known: dict[str, Entry], to: str | None) -> None:
    """What there is, as a table."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, caption="~ about, not looked up; disk: unpacked, all images")
    for column in ("name", "what", "repository", "size", "disk", "licence", "goes to"):
        table.add_column(column, justify="right" if column in ("size", "disk") else "left", no_wrap=True)
    for entry in known.values():
        size = UNKNOWN if entry.size is None else f"{'' if entry.sure else '~'}{_gb(entry.size)}"
        disk = UNKNOWN if entry.disk is None else f"{'' if entry.sure else '~'}{_gb(entry.disk)}"
        place = _place(entry, to) or "the hub's cache"
        table.add_row(entry.name, entry.what, entry.repo, size, disk, entry.licence, str(place))
    Console(width=max(Console().width, 200)).print(table)  # a name that is cut could not be typed


def _ask(entry: Entry, to: str | None, patterns: list[str]) -> list[Any]:
    """The files of ``entry`` that match, each with its size and whether it has to be fetched; of the top folder."""
    from huggingface_hub import snapshot_download

    if not patterns:
        return []
    with _said(entry):
        found = snapshot_download(entry.repo, **_where(entry, to), allow_patterns=patterns, dry_run=True)
    return [file for file in found if "/" not in file.filename]


@contextmanager
def _said(entry: Entry) -> Iterator[None]:
    """Turns what the hub and the network raise into a sentence."""
    from huggingface_hub.errors import DryRunError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except Exception as error:  # the client's own, and those of whichever library it speaks HTTP with
        cause = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
        page = _page(entry)
        if isinstance(cause, GatedRepoError):
            says = f"{entry.repo} is gated. Accept its licence at {page}, log in with `hf auth login`, and fetch again."
        elif isinstance(cause, RepositoryNotFoundError):
            says = f"the hub shows no {entry.repo}. If {page} opens for you, log in with `hf auth login`."
        elif isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            raise
        elif isinstance(cause, HfHubHTTPError):
            says = f"the hub refuses ({str(cause).splitlines()[0]}). Fetch again later: whole files are kept."
        else:
            says = (
                f"the Hugging Face hub cannot be reached ({type(cause).__name__}). Fetch again where there is a "
                "network: whole files are kept."
            )
        raise ValueError(f"{entry.name}: {says}") from error


def _where(entry: Entry, to: str | None) -> dict[str, Any]:
    place = _place(entry, to)
    return {"repo_type": "dataset" if entry.dataset else "model", "local_dir": place}


def _root(to: str | None) -> Path:
    """``data.root`` of corpora."""
    return Path(to or "data")


def _place(entry: Entry, to: str | None) -> Path | None:
    """The folder that files go to; None for the hub's cache."""
    if entry.dataset:
        return _root(to) / entry.folder
    return Path(to) / entry.name if to else None


def _pointing(entry: Entry, folder: Path) -> str:
    """The override by which a run finds weights that are not in the hub's cache."""
    weights = [folder / name for name in (*entry.weights, *entry.otherwise) if (folder / name).is_file()]
    return f" {entry.key}={_typed(weights[0] if entry.key == OPEN_CLIP else folder)}" if entry.key else ""


def _typed(place: Path | str) -> str:
    """As a shell and Hydra both read it."""
    return str(place) if re.fullmatch(r"[\w./~-]+", str(place)) else shlex.quote(f"'{place}'")


def _disk(entry: Entry, to: str | None) -> tuple[Path, int]:
    """The folder, of those that are there already, that files will lie under; and its disk."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = (_place(entry, to) or Path(HF_HUB_CACHE)).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return there, os.stat(there).st_dev


def _there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _size_of(folder: Path) -> int:
    """Bytes of the files that lie there already."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _page(entry: Entry) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{'datasets/' if entry.dataset else ''}{entry.repo}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
