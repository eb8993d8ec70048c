"""The arms of a sweep as they lie on disk, and whether comparing them is fair. Loads without torch."""

import json
from pathlib import Path
from typing import Any

from deepstack_pl.cli.folders import RESULTS


def read_arms(folder: Path) -> list[dict[str, Any]]:
    """The results of every arm, in the order in which they were written; ``name`` is the arm's folder."""
    files = sorted(folder.rglob(RESULTS), key=lambda file: file.stat().st_mtime)
    files = [file for file in files if not file.relative_to(folder).as_posix().startswith(".")]  # what was put aside
    named = ((str(file.parent.relative_to(folder)), file.read_text(encoding="utf-8")) for file in files)
    return [{"name": name, **json.loads(text)} for name, text in named]


def fairness(arms: list[dict[str, Any]], *, complete: bool = True) -> list[str]:
    """Whether arms differ in nothing but what they were meant to: data, order, initial weights; and who did not finish.

    Arms that did not finish trained on fewer samples, so that they are not compared. Arms of different seeds differ in
    order and weights by design: they are compared with those of their own seed. ``complete``: there are no others.
    """
    done = [arm for arm in arms if state(arm) == "finished"]
    all_of_them = "all arms" if complete and len(done) == len(arms) else "all arms that finished"
    seeds, all_one = {arm["name"]: arm["seed"] for arm in done}, {arm["name"]: 0 for arm in done}
    claims: list[tuple[str, dict[str, str], dict[str, int]]] = [
        ("same samples in the same order", {a["name"]: a["data"]["order_digest"] for a in done}, seeds),
        ("same validation samples", {a["name"]: a["data"]["fingerprint"]["val"] for a in done}, all_one),
    ]
    for part in sorted({part for arm in done for part in arm["init_digest"]}):
        by_shape: dict[str, dict[str, str]] = {}
        for arm in done:
            by_shape.setdefault(arm["architecture_digest"][part], {})[arm["name"]] = arm["init_digest"][part]
        claims += [(f"same initial weights ({part})", group, seeds) for group in by_shape.values()]
    claims.append(("same number of steps", {a["name"]: str(a["steps"]) for a in done}, all_one))
    lines = [
        _agree(claim, values, by, all_of_them if len(values) == len(done) else ", ".join(values))
        for claim, values, by in claims
        if len(values) > 1
    ]
    return lines + [f"{state(arm)}: {arm['name']}: {reason(arm)}" for arm in arms if state(arm) != "finished"]


def state(arm: dict[str, Any]) -> str:
    """How the arm ended; one that says it is running still counts as failed: it was ended from outside, or will be seen
    again.
    """
    return "failed" if arm["status"] == "running" else arm["status"]


def reason(arm: dict[str, Any]) -> str:
    """Why it did not finish."""
    if "reason" in arm:
        return arm["reason"]
    return f"at step {arm['steps']}" if arm["status"] == "interrupted" else "it is under way, or ended without a word"


def _agree(claim: str, values: dict[str, str], seeds: dict[str, int], who: str) -> str:
    """A line on whether all ``values`` (by arm) of one seed are equal."""
    apart = {(seeds[name], value) for name, value in values.items()}
    if len(apart) == len({seed for seed, _ in apart}):
        return f"{who}: {claim}{' for each seed' if len(set(values.values())) > 1 else ''}"
    return f"{who}: NOT the {claim} ({', '.join(f'{name} {value}' for name, value in values.items())})"
