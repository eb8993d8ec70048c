"""Values that no run can mean, and values that do not go together: what only the parent of all sections can see."""

from deepstack_pl.config.run import RunConfig
from deepstack_pl.data.config import Batching, DataConfig, Source, StreamKind
from deepstack_pl.language.config import LLMInit
from deepstack_pl.multimodal.config import build_plan, check_projector
from deepstack_pl.vision.config import check_weights


def check(run: RunConfig) -> None:
    """Refuse what needs neither torch nor a file to be seen as wrong.

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
    if run.seed < 0:
        raise ValueError(f"seed={run.seed}: seeds count from 0.")
    check_projector(build_plan(run.model, run.llm, run.vision), run.projector.kind, run.projector.sharing)
    _check_weights(run)
    _check_vision(run)
    _check_data(run)
    _check_steps(run)
    _check_optim(run)
    _check_evaluation(run)


def _check_weights(run: RunConfig) -> None:
    if run.llm.init is LLMInit.pretrained and not run.llm.checkpoint:
        raise ValueError(
            "llm.init=pretrained, but llm.checkpoint is not given: name a hub model or a local folder, or say "
            "llm.init=random."
        )
    check_weights(run.vision)


def _check_vision(run: RunConfig) -> None:
    width, heads = run.vision.width, run.vision.heads
    if heads < 1 or width % heads:
        raise ValueError(
            f"vision.heads={heads} does not divide vision.width={width}: every head takes an equal share of the width."
        )


def _check_data(run: RunConfig) -> None:
    data = run.data
    if data.source is Source.fine_print and data.fine_print.view_size != run.vision.image_size:
        raise ValueError(
            f"data.fine_print.view_size={data.fine_print.view_size}, but vision.image_size={run.vision.image_size}: "
            "fine facts are those that the global view cannot show, so pages must be drawn for the size it has. Say "
            f"data.fine_print.view_size={run.vision.image_size}, or take another data=."
        )
    _check_read(data)
    if data.stream is StreamKind.webdataset and data.batching is not Batching.samples:
        raise ValueError(
            f"data.batching={data.batching.name} with data.stream=webdataset: the library's pipeline knows no lengths "
            "before it reads. Say data.batching=samples, or data.stream=indexed."
        )


_OF_CORPORA = ((Source.llava_json, Source.corpus), "data=llava_json, or a corpus such as data=llava665k")
_OF_SHARDS = ((Source.shards,), "data=shards")
_READ_BY = {
    "path": _OF_CORPORA,
    "images": _OF_CORPORA,
    "shards": ((Source.corpus,), "a corpus such as data=llava665k"),
    "mixture": _OF_SHARDS,
    "urls": _OF_SHARDS,
}


def _check_read(data: DataConfig) -> None:
    """What is given is read: by this source, and by this stream."""
    values = {"path": data.path, "images": data.images, "shards": data.shards, "urls": data.urls}
    values["mixture"] = "[...]" if data.mixture else None
    for name, value in values.items():
        sources, say = _READ_BY[name]
        if value and data.source not in sources:
            raise ValueError(
                f"data.{name}={value}: data.source={data.source.name} does not read it. Say {say}, or leave it out."
            )
    if (data.stream is StreamKind.webdataset) is not bool(data.urls):
        raise ValueError(
            f"data.stream={data.stream.name} with data.urls={data.urls}: the webdataset stream reads its training "
            "shards from data.urls, the indexed one from data.root. Give stream=webdataset and urls together."
        )
    if data.urls and data.mixture:
        raise ValueError("data.mixture with data.stream=webdataset: mixtures are drawn by index. Take one of the two.")


def _check_steps(run: RunConfig) -> None:
    steps, epochs = run.trainer.get("max_steps"), run.data.epochs
    if epochs is not None and steps is not None:
        raise ValueError(
            f"data.epochs={epochs:g} and trainer.max_steps={steps}: a run has one length. Say "
            "trainer.max_steps=null, or data.epochs=null."
        )
    if epochs is not None and run.data.stream is StreamKind.webdataset:
        raise ValueError(
            f"data.epochs={epochs:g} with data.stream=webdataset: how many samples there are, nobody knows before the "
            "last is read. Say data.epochs=null trainer.max_steps=N."
        )
    if epochs is not None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"trainer.max_steps={steps}: a run is so many steps, 1 or more; the learning rate's decay ends there. Or "
            "say trainer.max_steps=null data.epochs=N."
        )


def _check_optim(run: RunConfig) -> None:
    optim = run.optim
    if not 0 <= optim.warmup_ratio < 1:
        raise ValueError(
            f"optim.warmup_ratio={optim.warmup_ratio}: the share of steps that warm up, from 0 to below 1; 0.03 is 3%."
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas={optim.betas}: AdamW takes two values, each from 0 to below 1: [0.9, 0.999].")


def _check_evaluation(run: RunConfig) -> None:
    evaluation = run.evaluation
    if evaluation.batch_size < 1:
        raise ValueError(f"evaluation.batch_size={evaluation.batch_size}: a batch holds 1 sample or more.")
    for name, value in (
        ("samples", evaluation.samples),
        ("final_samples", evaluation.final_samples),
        ("max_new_tokens", evaluation.max_new_tokens),
    ):
        if value < 1:
            raise ValueError(f"evaluation.{name}={value}: use 1 or more (evaluation=final: nothing during training).")
    if not 0 < evaluation.confidence < 1:
        raise ValueError(f"evaluation.confidence={evaluation.confidence}: use a share between 0 and 1, such as 0.95.")
