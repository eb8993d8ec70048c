"""Where runs live: one folder each under ``outputs/``, and ``outputs/latest``, which names the newest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepstack_pl.files import hold, hold_or_warn, let_go, write_text
from deepstack_pl.training import checkpoints
from deepstack_pl.training.checkpoints import Checkpoint

OUTPUTS = Path("outputs")
LATEST = OUTPUTS / "latest"
CONFIG, RESULTS, RECEIPT = "config.yaml", "results.json", "receipt.json"
CHECKPOINTS = "checkpoints"
_MOMENT = 0.5  # seconds in which somebody may only be looking


def relative(path: Path | str) -> str:
    """``path`` as seen from here, where it lies below; results name no machine's folders."""
    whole, here = Path(path).resolve(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(path)


def remember(folder: Path) -> None:
    """Make ``folder`` the newest run."""
    write_text(LATEST, f"{relative(folder)}\n")


def discard_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began; a sweep's folder goes with its last arm. One that
    another process holds is a run's that has written nothing yet.
    """
    for path in (folder, folder.parent):
        if path.is_dir() and path.resolve() != OUTPUTS.resolve() and not any(path.iterdir()):
            _discard(path)


def _discard(path: Path) -> None:
    try:
        handle = hold(path)
    except (BlockingIOError, FileNotFoundError):
        return
    except OSError:
        handle = None  # of a file system without locks
    try:
        path.rmdir()
    except OSError:
        return  # somebody has begun there
    finally:
        if handle is not None:
            let_go(handle)


class Live(ValueError):
    """A run's folder is another process's now; nothing there may be touched."""


@contextmanager
def alone(folder: Path, *, free: bool = False) -> Iterator[int | None]:
    """Hold a run's folder, as the first of all that write there: a second start would train into the same files. What
    `hold` gives is given; ``free``: whether the run could as well lie elsewhere.

    Raises:
        Live: another start does so now.
    """
    try:
        handle = _taken(folder)
    except BlockingIOError as error:
        other = "; or name another folder with hydra.run.dir" if free else ""
        raise Live(
            f"{relative(folder)} is being trained in by another process. Wait for its end, or stop it{other}."
        ) from error
    try:
        yield handle
    finally:
        if handle is not None:
            let_go(handle)


def _taken(folder: Path) -> int | None:
    """Who looks at a folder, or removes an empty one, is gone in a moment."""
    end = time.monotonic() + _MOMENT
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return hold_or_warn(folder, relative(folder))
        except (BlockingIOError, FileNotFoundError):
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def claim(folder: Path) -> None:
    """Refuse to write a run over another.

    Raises:
        ValueError: the folder holds a run already.
    """
    if (folder / CONFIG).exists():
        raise ValueError(
            f"{relative(folder)} already holds a run. Go on with it (ckpt_path={relative(folder)}), or name another "
            "folder with hydra.run.dir."
        )
    folder.mkdir(parents=True, exist_ok=True)


def newest() -> Path:
    """The run that ``outputs/latest`` names; without that file, the one that was saved last.

    Raises:
        ValueError: there is none.
    """
    if LATEST.is_file():
        folder = Path(LATEST.read_text(encoding="utf-8").strip())
        if (folder / CONFIG).is_file():
            return folder
    saved = sorted(OUTPUTS.glob(f"**/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    if saved:
        return saved[-1].parent
    raise ValueError(
        f"ckpt_path=last: no run under {OUTPUTS}/ to go on with. Start one without ckpt_path, or name a run's folder: "
        "ckpt_path=FOLDER."
    )


def with_model(folder: Path) -> Path:
    """``folder``, or the newest run for ``outputs/latest``, which is a file that names it.

    Raises:
        ValueError: no model lies there.
    """
    if folder.absolute() == LATEST.absolute():
        folder = newest()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model lies there (config.json is missing). Name a finished run's folder.")
    return folder


def checkpoint_of(folder: Path) -> tuple[Checkpoint, list[str]]:
    """What the run in ``folder`` goes on from: its newest checkpoint that looks whole; and a sentence for each newer
    one that does not.

    Raises:
        ValueError: it left none.
    """
    found, passed = checkpoints.newest(folder / CHECKPOINTS)
    if found is None:
        why = " ".join(passed) or "It ended before its first one."
        raise ValueError(
            f"{relative(folder)} holds no checkpoint to go on from. {why} Start a new run, or name another folder: "
            "ckpt_path=FOLDER."
        )
    return found, passed
