"""Errors that a user can mend, as one sentence; everything else keeps its traceback."""

import errno
import linecache
import re
import traceback
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Any

import yaml
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from deepstack_pl.config.overrides import near, unknown_key
from deepstack_pl.config.schema import Schema

_IN_FILE = re.compile(
    r"In '(?P<file>[^']+)': \w+ raised while composing config:\n(?P<says>[^\n]*)(?:\n\s+full_key: (?P<key>\S+))?"
)
_NOT_DELETED = re.compile(r"Could not delete '(?P<group>[^'=]+)[^']*'\. No match in the defaults list")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # said of a file that is open, which has no name then
_ROOM = (
    "Make room. A run that has saved a checkpoint goes on with ckpt_path=ITS_FOLDER; for everything else give the same "
    "command again."
)
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*\n([\w.]+): (.*)", re.DOTALL)


def sentence(error: BaseException, schema: Schema) -> str | None:
    """What to tell the user about ``error``; None where it is a mistake of ours and the traceback must be seen."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"Cannot read the override '{error.override}': {str(error).splitlines()[0]}"
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error, schema)
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        return _composition(error, schema)
    if isinstance(error, yaml.YAMLError):
        return f"This is no YAML: {' '.join(str(error).split())}"
    return refusal(error)


def refusal(error: BaseException) -> str | None:
    """`sentence` of what happens once the run is composed, where no schema is at hand."""
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, ValueError | RuntimeError | OSError):
        return _ours(error)
    return None


def _missing_option(error: MissingConfigException) -> str:
    if not error.missing_cfg_file or "/" not in error.missing_cfg_file:
        return str(error).splitlines()[0]
    group, _, option = error.missing_cfg_file.rpartition("/")
    known = list(error.options or [])
    hint = near(option, known)
    has = f"; {group} has {', '.join(known)}." if known else "."
    return f"{group}={option}: no such option{has}" + (f" Did you mean {hint}?" if hint else "")


def _composition(error: HydraException, schema: Schema) -> str:
    """What Hydra met while composing: in an override, with OmegaConf's error as its cause, or in a file, as text."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        if (error.__cause__.full_key or "").startswith("hydra."):
            return " ".join(str(error).split())  # Hydra's own tree: it knows better what it holds
        return _omegaconf(error.__cause__, schema)
    deleted = _NOT_DELETED.match(str(error))
    if deleted:
        group = deleted["group"]
        return (
            f"~{group}: there is no single {group} to leave out; with {group}=[...], here or in an experiment, there "
            f"are several. Take that or ~{group} away, or choose one: {group}=NAME."
        )
    in_file = _IN_FILE.match(str(error))
    if in_file:
        says, key = in_file["says"], in_file["key"] or ""
        item = "." not in key and f"object_type={schema.root.__name__}" not in str(
            error
        )  # of a list: the key lacks its path
        return f"conf's {in_file['file']}: {says if item else _value(says, key, None, schema)}"
    return " ".join(str(error).split())


def _omegaconf(error: OmegaConfBaseException, schema: Schema) -> str:
    key, first = error.full_key or "", str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: give it on the command line, {key}=VALUE."
    return _value(first, key, error.object_type, schema)


def _value(says: str, key: str, owner: Any, schema: Schema) -> str:
    """OmegaConf's first line about ``key``, in our words where we know more."""
    if re.match(r"Key '.*' (is )?not in ", says):
        return _no_such_key(key, owner, schema)
    choice = re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", says)
    if choice:
        hint = near(choice[1], choice[2].split(", "))
        return f"{key}={choice[1]}: use {choice[2]}." + (f" Did you mean {hint}?" if hint else "")
    return f"{key}: {says}" if key else says


def _no_such_key(key: str, owner: Any, schema: Schema) -> str:
    if "." in key or owner is schema.root or not is_dataclass(owner):
        return unknown_key(key, schema)
    known = [field.name for field in fields(owner)]  # an item of a list: OmegaConf gives its key without the path
    hint = near(key, known)
    return f"Unknown key {key}: here stand {', '.join(known)}." + (f" Did you mean {hint}?" if hint else "")


def _instantiation(error: InstantiationException) -> str:
    """Hydra hides what a ``_target_`` said in a message of several lines; its cause says it in one."""
    key = re.search(r"full_key: (\S+)", str(error))
    where = f"{key[1]}: " if key else ""
    return f"{where}{error.__cause__ or str(error).splitlines()[0]}"


def _ours(error: ValueError | RuntimeError | OSError) -> str | None:
    """Our own refusals: a ``raise`` in a file of this package, in this process or in a data worker; and what the system
    says of a file that it names, or of a disk that is full.
    """
    worker = _WORKER.match(str(error))
    if worker:
        last = str(error).rsplit('File "', 1)[-1]
        ours = "deepstack_pl" in last.splitlines()[0] and last.splitlines()[1].strip().startswith("raise ")
        return worker[2].strip() if ours else None
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_ROOM):
        place = "" if error.filename is None else f"{error.filename}: "
        room = f" {_ROOM}" if error.errno in _NO_ROOM else ""
        return f"{place}{error.strerror}.{room}"
    return str(error) if _raised_in_package(error.__traceback__) else None


def _raised_in_package(tb: TracebackType | None) -> bool:
    """Whether the innermost frame is a ``raise`` of ours: what a library or an operator raises is a mistake of ours."""
    frames = list(traceback.walk_tb(tb))
    if not frames:
        return False
    frame, line = frames[-1]
    ours = str(frame.f_globals["__name__"]).startswith("deepstack_pl")
    return ours and linecache.getline(frame.f_code.co_filename, line).strip().startswith("raise ")
