"""From Hydra's composed tree, or a saved config.yaml, to a checked RunConfig."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from deepstack_pl.config.evaluate import EvaluateConfig
from deepstack_pl.config.evaluate import check as check_evaluate
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.values import check

T = TypeVar("T")


def register() -> None:
    """Make the schemas of whole trees known to Hydra: the first entry of a primary's defaults."""
    ConfigStore.instance().store(name="run", node=RunConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def from_hydra(composed: DictConfig | ListConfig, files: Mapping[str, str] | None = None) -> RunConfig:
    """The typed run; merged once more onto a fresh schema, because Hydra lets ``+`` add keys to a typed section.

    ``files``: by group, the file of the option that was chosen, for what is to be said about it.

    Raises:
        omegaconf.errors.OmegaConfBaseException: an unknown key, a value of another type, one that is missing.
        ValueError: values that do not go together.
    """
    run = _typed(composed, RunConfig, files or {})
    check(run)
    return run


def evaluate_from_hydra(composed: DictConfig | ListConfig) -> EvaluateConfig:
    """As `from_hydra`, of ``python evaluate.py``."""
    config = _typed(composed, EvaluateConfig, {})
    check_evaluate(config)
    return config


def _typed(composed: DictConfig | ListConfig, cls: type[T], files: Mapping[str, str]) -> T:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(_not_given(missing, files))
    values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    assert isinstance(found, cls)
    return found


def save(run: RunConfig, file: Path) -> None:
    """Write ``run`` in full, as `load` reads it."""
    OmegaConf.save(OmegaConf.structured(run), file)


def as_text(run: RunConfig) -> str:
    """As `save` writes it."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def flat(run: RunConfig) -> dict[str, Any]:
    """Its values by dotted name; lists are values."""

    def walk(values: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(values, dict) and values:
            for key, value in values.items():
                yield from walk(value, f"{name}.{key}" if name else str(key))
        else:
            yield name, values

    return dict(walk(OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True), ""))


def load(file: Path, overrides: list[str]) -> RunConfig:
    """A saved run, with dotted ``overrides`` on top.

    Raises:
        ValueError: ``file`` is damaged; and what `from_hydra` raises.
    """
    try:
        saved = OmegaConf.load(file)
    except YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged ({told}). Restore it: a run is what its config.yaml says.") from error
    assert isinstance(saved, DictConfig)
    if "strategy" in saved.get("strategy", {}):  # of before there were strategies: the Trainer's own arguments
        saved["strategy"] = {"name": "single"}
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), saved)
    return from_hydra(OmegaConf.merge(merged, OmegaConf.from_dotlist(overrides)))


def _not_given(missing: list[str], files: Mapping[str, str]) -> str:
    group, _, key = missing[0].partition(".")
    if key == "name" and group in files:  # every option names itself, so that reports can name it
        file = Path(files[group])
        return f"{missing[0]} is not given: {file} lacks it. Write `name: {file.stem}` into that file."
    return f"Not given: {', '.join(missing)}. Say {missing[0]}=VALUE."
