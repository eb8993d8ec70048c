"""The house rules that import-linter, ruff and pyright cannot see."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "deepstack_pl"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Places on somebody's machine. The look-behind lets "docs/home/" and web addresses pass.
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:home|root|work|Users|opt|mnt|scratch)/\w")


def modules(files: list[Path]) -> list[str]:
    dotted = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter: what this one has imported already must not count."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_importing_any_module_is_silent() -> None:
    done = python("import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]", *modules(SOURCES))
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_configs_and_the_plan_load_without_torch() -> None:
    values = {*PACKAGE.glob("*/config.py"), PACKAGE / "stacking" / "plan.py", *PACKAGE.glob("config/*.py")}
    names = modules(sorted(values))
    assert {"deepstack_pl.stacking.config", "deepstack_pl.multimodal.config", "deepstack_pl.config.run"} <= set(names)
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "transformers", "lightning", "open_clip", "webdataset"} & sys.modules.keys()
    if heavy:
        sys.exit(f"{name} imports {sorted(heavy)}")
"""
    done = python(code, *names)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_code_is_a_package_whose_init_holds_only_a_docstring() -> None:
    for folder in {file.parent for file in SOURCES}:
        init = folder / "__init__.py"
        assert init.is_file(), f"{folder} has no __init__.py: it would not be installed"
        tree = ast.parse(init.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{init} does not say what the room does"
        if folder != PACKAGE / "multimodal":  # which registers the Auto classes
            assert len(tree.body) == 1, f"{init} holds more than its docstring"


def test_no_source_file_is_longer_than_300_lines() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert {file: lines for file, lines in lengths.items() if lines > 300} == {}


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    exact = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9a-z.]*")  # no addresses, no files, no local builds
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not exact.fullmatch(line)] == []


def test_every_direct_dependency_is_constrained_to_a_version_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["sweep"], *extras["serve"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt has no version of {name}"
        assert requirement.specifier.contains(pinned[name]), f"{text} does not allow {pinned[name]}"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found: list[str] = []
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if not file.is_file():  # deleted, but still in the index
            continue
        lines = file.read_bytes().decode("utf-8", errors="ignore").splitlines()
        found += [f"{name}:{n}: {line.strip()[:100]}" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []


@pytest.mark.parametrize(
    ("package", "unsafe"),
    [
        ("torch", "2.9"),  # weights_only could be got around: CVE-2025-32434, CVE-2026-24747
        ("transformers", "5.2"),  # remote code in spite of trust_remote_code=False: CVE-2026-4372, CVE-2026-5241
        ("lightning", "2.6.5"),  # 2.6.2 and 2.6.3 were malicious uploads; code ran in load_from_checkpoint
    ],
)
def test_no_release_that_is_known_to_be_unsafe_is_allowed(package: str, unsafe: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = (each for each in map(Requirement, project["dependencies"]) if each.name == package)
    assert unsafe not in required.specifier
    assert version(package) in required.specifier


def test_nothing_runs_code_that_comes_with_weights() -> None:
    """No remote code, no pickles, no archive unpacked by its own names: what is allowed is listed, and tested there."""
    allowed = {
        "training/restore.py": {"pickle"},  # one Unpickler, through a list of classes
        "cli/fetch.py": {"unpacked"},  # a corpus' zip: names stay inside, sizes are bounded
    }
    found = {str(file.relative_to(PACKAGE)): dangers(file.read_text()) for file in SOURCES}
    assert {file: kinds for file, kinds in found.items() if kinds} == allowed


# What would run, or lay down, what somebody else wrote.
DANGERS = {
    "remote code": r"trust_remote_code(?![^\n]*False)",  # as an argument, a key or an attribute
    "pickle": r"\b(?:c?[pP]ickle|dill|joblib|shelve)\.(?:loads?|Unpickler|open)\b|read_pickle|allow_pickle(?!=False)|"
    r"from (?:c?[pP]ickle|dill|joblib|shelve) import (?!UnpicklingError\n)",
    "weights": r"load[^\n]*weights_only=False|weights_only\W{2,4}False|torch\.load\((?!.*weights_only=True)|"
    r"torch\.(?:jit|package)\b",
    "unpacked": r"\.extract(?:all)?\(|unpack_archive",
    "run": r"shell=True|os\.system\(|(?<![.\w])(?:eval|exec)\(",
}


def dangers(text: str) -> set[str]:
    return {kind for kind, pattern in DANGERS.items() if re.search(pattern, text)}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("from_pretrained(x, trust_remote_code=True)", "remote code"),
        ('options = {"trust_remote_code": True}', "remote code"),
        ("settings.trust_remote_code = asked", "remote code"),
        ("pickle.load(file)", "pickle"),
        ("pickle.loads(data)", "pickle"),
        ("from pickle import loads\n", "pickle"),
        ("np.load(file, allow_pickle=True)", "pickle"),
        ("torch.load(file)", "weights"),
        ('options = {"weights_only": False}', "weights"),
        ("tar.extract(member, folder)", "unpacked"),
        ("tar.extractall(folder)", "unpacked"),
        ("shutil.unpack_archive(file)", "unpacked"),
        ("eval(text)", "run"),
    ],
)
def test_what_would_run_foreign_code_is_seen(text: str, kind: str) -> None:
    assert dangers(text) == {kind}


@pytest.mark.parametrize("text", ["trust_remote_code=False", "model.eval()", "from pickle import UnpicklingError\n"])
def test_what_runs_nothing_is_let_be(text: str) -> None:
    assert dangers(text) == set()
