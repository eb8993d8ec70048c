"""Files that are whole or not there."""

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write ``file`` in one stroke: a reader finds the old text or the new, never half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
