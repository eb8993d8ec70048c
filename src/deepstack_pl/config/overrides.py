"""The command line's overrides, read before Hydra composes: what is misspelt is named, with the near miss.

Hydra itself lets ``+model.strat_layer=2`` and ``experiment=fuor_arms`` pass.
"""

import difflib
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from deepstack_pl.config.schema import Kind, Schema

_CLOSE = 0.5  # a little laxer than difflib's own measure, so that fi3 finds phi3
_TYPO = 0.85  # so near that even a key asked for with + is taken for a slip


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides, read by Hydra's grammar.

    Raises:
        hydra.errors.OverrideParseException: one cannot be read.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


def check(overrides: Iterable[Override], schema: Schema) -> None:
    """Refuse the first override that names no key or no option.

    Raises:
        ValueError: with the full key, the override as typed, and the near miss.
    """
    groups = schema.groups()
    for override in overrides:
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            continue
        if key in groups:
            _check_options(override, schema)
        else:
            _check_key(override, schema, groups)


def near(wrong: str, known: Iterable[str]) -> str | None:
    """The closest of ``known``, if it is close."""
    found = difflib.get_close_matches(wrong, list(known), n=1, cutoff=_CLOSE)
    return found[0] if found else None


def unknown_key(key: str, schema: Schema, typed: str | None = None) -> str:
    """The sentence about ``key``, which no section holds."""
    parent = _known_part(key, schema)
    hint = _suggestion(key, parent, schema)
    if hint:
        tail = f"Did you mean {hint}?"
    else:
        names = [path.rpartition(".")[2] for path in schema.below(parent)]
        tail = f"{parent or 'A run'} has {', '.join(names)}." if names else f"{parent} has no keys."
    where = f" (in '{typed}')" if typed else ""
    return f"Unknown key {key}{where}. {tail}"


def _check_options(override: Override, schema: Schema) -> None:
    group, typed = override.key_or_group, override.input_line
    if override.is_delete() and override.value() is None:
        return
    if group in schema.kinds and (override.is_add() or override.is_force_add()):
        raise ValueError(f"{typed}: {group} is chosen already. Write it without +, to choose another.")
    for value in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
        for option in value if isinstance(value, list) else [value]:
            known = schema.options(group)
            if option is None:
                raise ValueError(f"{typed}: to do without {group}, write ~{group}.")
            if "/" in str(option) or str(option) in known:
                continue  # an option in a sub-folder is Hydra's to find
            hint = near(str(option), known)
            raise ValueError(
                f"{group}={option}: no such option; {group} has {', '.join(known)}."
                + (f" Did you mean {hint}?" if hint else "")
            )


def _check_key(override: Override, schema: Schema, groups: list[str]) -> None:
    key, typed = override.key_or_group, override.input_line
    if key in schema.kinds or key in schema.below(key.rpartition(".")[0]):
        return
    parent = _known_part(key, schema)
    opened = bool(parent) and schema.kinds.get(parent, Kind.opened) is Kind.opened
    if opened and (override.is_add() or override.is_force_add()):
        slip = difflib.get_close_matches(key, schema.below(parent), n=1, cutoff=_TYPO)
        if not slip:
            return  # an open section takes new keys; who receives them checks them
    if opened and parent in schema.kinds and not schema.below(parent):
        return  # a list, or a section that conf leaves empty: OmegaConf knows better
    if "." not in key and (group := near(key, groups)) and not near(key, schema.below("")):
        raise ValueError(f"Unknown group {key} (in '{typed}'). Did you mean {group}?")
    raise ValueError(unknown_key(key, schema, typed))


def _known_part(key: str, schema: Schema) -> str:
    """The longest known section that ``key`` starts with."""
    words = key.split(".")
    for length in range(len(words) - 1, 0, -1):
        path = ".".join(words[:length])
        if path in schema.kinds or path in schema.below(".".join(words[: length - 1])):
            return path
    return ""


def _suggestion(key: str, parent: str, schema: Schema) -> str | None:
    """The key that was meant: the nearest sibling at each level, or the same name elsewhere in the tree."""
    words, path = key.split("."), parent
    for word in words[len(parent.split(".")) if parent else 0 :]:
        names = {known.rpartition(".")[2]: known for known in schema.below(path)}
        hit = names.get(word) or names.get(near(word, names) or "")
        if hit is None:
            break  # a section was misspelt, and the key in it is unknown too: the section alone
        path = hit
    path = path if path != parent else ""
    namesakes = [known for known in schema.kinds if known.rpartition(".")[2] == words[-1]]
    if 0 < len(namesakes) <= 3 and path.rpartition(".")[2] != words[-1]:
        return " or ".join(namesakes)
    return path or None
