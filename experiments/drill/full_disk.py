"""A disk that runs full while a checkpoint or a shard is written: what is said, what is left, and how it goes on.

    python experiments/drill/full_disk.py

The disk is a tmpfs of 64 MB in a mount namespace of this process's own; something else fills it up at the worst moment.
Needs Linux with user namespaces (unshare).
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from drilling import ENVIRONMENT, ROOT, arguments, markdown, report, small_run
from kills import tensors_of

from deepstack_pl.training.checkpoints import newest

SIZE = 64  # MB
STEPS = 40


def in_a_namespace() -> None:
    """Start again where mounting is allowed and nobody else sees it."""
    if os.environ.get("DRILL_NAMESPACE") != "1":
        words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(words[0], words, {**os.environ, "DRILL_NAMESPACE": "1"})


class Disk:
    """A small one at ``place``, and what fills it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(place)], check=True)
        self._filler = place / "filler"
        self._full = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def fill(self) -> None:
        self._full.set()

    def make_room(self) -> None:
        self._full.clear()
        time.sleep(0.1)
        self._filler.unlink(missing_ok=True)

    def leave(self, megabytes: float) -> None:
        """Fill all but so much."""
        free = os.statvfs(self.place).f_bavail * os.statvfs(self.place).f_frsize
        self._filler.write_bytes(bytes(max(0, free - int(megabytes * 1e6))))

    def _fill(self) -> None:
        """Whatever is freed while the disk is to be full is taken at once."""
        while not self._end.is_set():
            if not self._full.wait(0.01):
                continue
            with self._filler.open("ab", buffering=0) as file:
                for size in (2**20, 4096):
                    try:
                        while self._full.is_set():
                            if file.write(bytes(size)) < size:
                                break
                    except OSError:
                        continue
            time.sleep(0.001)


@contextmanager
def disk(name: str) -> Iterator[Disk]:
    with tempfile.TemporaryDirectory() as root:
        found = Disk(Path(root) / name)
        try:
            yield found
        finally:
            found._end.set()
            found.make_room()
            found._thread.join()
            subprocess.run(["umount", "-l", str(found.place)], check=True)


def said_by(command: list[str], watch: Callable[[str], None] = lambda said: None) -> tuple[int, str]:
    """Exit status and words of ``command``; ``watch`` is shown what was said so far, again and again."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out, cwd=tempfile.gettempdir())
        end = time.monotonic() + 300
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
                raise SystemExit(f"{' '.join(command)} did not end in five minutes.")
            watch(os.pread(out.fileno(), 1 << 20, 0).decode(errors="replace"))
            time.sleep(0.002)
        return process.returncode, os.pread(out.fileno(), 1 << 20, 0).decode(errors="replace")


def line_with(said: str, word: str) -> str:
    """The line of ``said`` that has ``word``; all of it where none has."""
    return next((line.strip() for line in said.splitlines() if word in line), said[-1500:].strip() or "nothing")


def checkpoints(data: Path, whole: Path) -> list[list[Any]]:
    """Full for the time of one save; and full until somebody makes room."""
    rows = []
    on = [sys.executable, str(ROOT / "train.py")]
    for name, briefly in (("while one checkpoint was written", True), ("for good", False)):
        with disk("runs") as small:
            folder = small.place / "run"
            filled = False

            def watch(said: str, small: Disk = small, folder: Path = folder, briefly: bool = briefly) -> None:
                nonlocal filled
                drafts = list(folder.glob("checkpoints/step-*.tmp-*"))
                if not filled and drafts and newest(folder / "checkpoints")[0]:
                    small.fill()
                    filled = True
                if filled and briefly and "was not written" in said:
                    small.make_room()

            status, said = said_by(small_run(folder, data, *_MORE), watch)
            there, passed = newest(folder / "checkpoints", deep=True)
            sentence = line_with(said, "was not written") if briefly else said.strip().splitlines()[-1]
            small.make_room()
            again = 0
            if status:
                again, more = said_by([*on, f"ckpt_path={folder}"])
                said += more
            same = again == 0 and _same(whole, folder)
            rows.append(
                [
                    f"disk full {name}",
                    status,
                    f"step {there.step}" if there and not passed else "NONE",
                    sentence.partition("UserWarning: ")[2] or sentence,
                    "bit-identical" if same else f"NOT: {said[-1500:]}",
                ]
            )
    return rows


def shards(data: Path) -> list[list[Any]]:
    """Both ways of writing shards: a corpus that is built, and the synthetic one."""
    script = ROOT / "tests" / "data" / "replicas.py"
    with tempfile.TemporaryDirectory() as root, disk("shards") as small:
        subprocess.run([sys.executable, str(script), "llava665k", root], check=True, env=ENVIRONMENT)
        for image in Path(root).rglob("*.jpg"):  # long enough to be filled up in the middle of; a JPEG ends before that
            if image.stat().st_size > 1000:
                with image.open("ab") as file:
                    file.write(bytes(500_000))
        entry = "from deepstack_pl.cli.main import entry; entry()"
        words = [sys.executable, "-c", entry, "shards", "build", "data=llava665k", f"data.root={root}", "missing=skip"]
        words += ["processes=1", "shard_mb=2"]
        whole, out = Path(root) / "whole", small.place / "built"
        if said_by([*words, f"out={whole}"])[0]:
            raise SystemExit("The shards could not be built where there is room.")

        def watch(said: str) -> None:
            if any(out.rglob("*.tar")):
                small.fill()

        build = [*words, f"out={out}"]
        rows = [_written("deepstack shards build", small, build, whole, out, watch)]
        small.leave(0.05)
        made, place = data, small.place / "data"
        small_data = small_run(small.place.parent / "run", place, *_MORE, "trainer.max_steps=1")
        rows.append(_written("train.py, data=fine_print", small, small_data, made, place))
    return rows


def _written(
    name: str, small: Disk, command: list[str], whole: Path, out: Path, watch: Callable[[str], None] = lambda said: None
) -> list[Any]:
    status, said = said_by(command, watch)
    manifests = [str(file.relative_to(out)) for file in out.rglob("manifest.json")]
    small.make_room()
    again, more = said_by(command)
    same = again == 0 and _tars(whole) == _tars(out)
    return [
        f"{name}: disk full",
        status,
        "no manifest" if not manifests else f"MANIFESTS {manifests}",
        line_with(said, "space"),
        "byte-identical" if same else f"NOT: {more[-1500:]}",
    ]


def _tars(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.tar"))}


def _same(whole: Path, folder: Path) -> bool:
    one, other = tensors_of(whole), tensors_of(folder)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


_MORE = (
    "data.fine_print.train_pages=256",
    f"trainer.max_steps={STEPS}",
    "callbacks.checkpoint.every_steps=2",
    "evaluation=final",
)


def main() -> int:
    args = arguments(__doc__)
    in_a_namespace()
    with tempfile.TemporaryDirectory() as place:
        data, whole = Path(place) / "data", Path(place) / "whole"
        status, said = said_by(small_run(whole, data, *_MORE))
        if status:
            raise SystemExit(said)
        rows = [*checkpoints(data, whole), *shards(data)]
    rows = [
        [*row[:3], re.sub(r"/\S+/(runs|shards)/", r"DISK/", str(row[3])).replace("\n", " "), *row[4:]] for row in rows
    ]
    good = all(str(row[4]).endswith("identical") and row[2] not in ("NONE",) for row in rows)
    good = good and not any(str(row[2]).startswith("MANIFESTS") for row in rows)
    head = ["what", "exit status", "left whole", "said", "the same command with room, compared with a run undisturbed"]
    report("full_disk", "Disk full", [markdown(head, rows)], rows, args)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
