"""A RunConfig for commands that are not a run: composed as train.py composes it, from the same words."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir

import deepstack_pl
from deepstack_pl.config.errors import sentence
from deepstack_pl.config.load import from_hydra, register
from deepstack_pl.config.overrides import check, parse
from deepstack_pl.config.run import RunConfig
from deepstack_pl.config.schema import Schema


def compose(words: Sequence[str]) -> RunConfig:
    """The configuration that ``python train.py WORDS`` would run.

    Raises:
        ValueError: no conf folder, an unknown key or option, values that do not go together.
    """
    conf = conf_folder()
    register()
    schema = Schema((conf,))
    try:
        overrides = parse(list(words))
        check(overrides, schema)
        with initialize_config_dir(str(conf), version_base="1.3"):
            return from_hydra(hydra_compose("train", list(words)))
    except Exception as error:
        text = sentence(error, schema)
        if text is None:
            raise
        raise ValueError(text) from error


def conf_folder() -> Path:
    """``conf/`` of the folder that the command was typed in, else of the source that is installed."""
    for root in (Path.cwd(), Path(deepstack_pl.__file__).parents[2]):
        if (root / "conf" / "train.yaml").is_file():
            return (root / "conf").resolve()
    raise ValueError("There is no conf/train.yaml here. Run the command in the project's folder.")
