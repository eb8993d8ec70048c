"""From Hydra's composed tree, or a saved config.yaml, to a checked RunConfig."""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Source
from deepstack_pl.language.config import LLMInit
from deepstack_pl.multimodal.config import build_plan
from deepstack_pl.vision.config import VisionInit


def register() -> None:
    """Make ``run``, the schema of the whole tree, known to Hydra: the first entry of every primary's defaults."""
    ConfigStore.instance().store(name="run", node=RunConfig)


def from_hydra(composed: DictConfig | ListConfig) -> RunConfig:
    """The typed run; merged once more onto a fresh schema, because Hydra lets ``+`` add keys to a typed section.

    Raises:
        omegaconf.errors.OmegaConfBaseException: an unknown key, a value of another type, one that is missing.
        ValueError: values that do not go together.
    """
    missing = OmegaConf.missing_keys(composed)
    if missing:
        raise ValueError(f"Not given: {', '.join(sorted(missing))}. Say {min(missing)}=VALUE.")
    values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
    run = OmegaConf.to_object(merged)
    assert isinstance(run, RunConfig)
    check(run)
    return run


def save(run: RunConfig, file: Path) -> None:
    """Write ``run`` in full, as `load` reads it."""
    OmegaConf.save(OmegaConf.structured(run), file)


def load(file: Path, overrides: list[str]) -> RunConfig:
    """A saved run, with dotted ``overrides`` on top."""
    saved = OmegaConf.load(file)
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), saved)
    return from_hydra(OmegaConf.merge(merged, OmegaConf.from_dotlist(overrides)))


def check(run: RunConfig) -> None:
    """What only the parent of all sections can see.

    Raises:
        ValueError: naming the values, the rule and the remedy.
    """
    if run.ckpt_path is not None:
        raise ValueError(
            f"ckpt_path={run.ckpt_path} belongs on the command line alone: it goes on with a run under that run's own "
            "saved config, and conf has nothing to add."
        )
    if "num_hidden_layers" not in run.llm.architecture:
        raise ValueError(
            f"llm={run.llm.name}: llm.architecture.num_hidden_layers is not given, and plans are checked against it. "
            "Write the checkpoint's values into the option, as conf/llm/phi3.yaml does."
        )
    build_plan(run.model, run.llm, run.vision)
    _check_sources(run)
    _check_steps(run)


def _check_sources(run: RunConfig) -> None:
    if run.llm.init is LLMInit.pretrained and not run.llm.checkpoint:
        raise ValueError(
            "llm.init=pretrained, but llm.checkpoint is not given: name a hub model or a local folder, or say "
            "llm.init=random."
        )
    if run.vision.init is VisionInit.pretrained and not (run.vision.open_clip_model and run.vision.open_clip_weights):
        raise ValueError(
            "vision.init=pretrained needs vision.open_clip_model and vision.open_clip_weights (a tag of open_clip's, "
            "or a file). Give both, or say vision.init=random."
        )
    data = run.data
    if data.source is Source.fine_print and data.fine_print.view_size != run.vision.image_size:
        raise ValueError(
            f"data.fine_print.view_size={data.fine_print.view_size}, but vision.image_size={run.vision.image_size}: "
            "fine facts are those that the global view cannot show, so pages must be drawn for the size it has. Say "
            f"data.fine_print.view_size={run.vision.image_size}, or take another data=."
        )


def _check_steps(run: RunConfig) -> None:
    steps = run.trainer.get("max_steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"trainer.max_steps={steps}: a run is so many steps, 1 or more; the learning rate's decay ends there."
        )
    for name, value in (("data.batch_size", run.data.batch_size), ("evaluation.batch_size", run.evaluation.batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: a batch holds 1 sample or more.")
    if not 0 < run.evaluation.confidence < 1:
        raise ValueError(
            f"evaluation.confidence={run.evaluation.confidence}: use a share between 0 and 1, such as 0.95."
        )
