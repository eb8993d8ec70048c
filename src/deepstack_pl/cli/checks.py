"""What is refused before a run costs anything: it takes torch to know, but no data and no weights."""

import difflib
import inspect
import re
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from huggingface_hub.errors import StrictDataclassError
from hydra.utils import get_method
from transformers.models.auto import CONFIG_MAPPING

from deepstack_pl.cli.layout import rows_are_shared
from deepstack_pl.cli.machines import wanted
from deepstack_pl.config.run import RunConfig
from deepstack_pl.language.config import Attention, LLMConfig
from deepstack_pl.language.template import IMAGE, TEMPLATES
from deepstack_pl.multimodal.build import OLDER, text_config
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.multimodal.start import require_weights
from deepstack_pl.training.sharding import PRECISIONS, replicas_of, shares_weights

# Arguments of the Trainer that would make a run other than its config says, and what to say instead.
_TAKEN = {
    "fast_dev_run": "it would end before max_steps and save nothing. dry_run=step tries one real step.",
    "limit_train_batches": "batches are a function of seed and step, for trainer.max_steps steps. Shorten a run there.",
    "overfit_batches": "batches are a function of seed and step. experiment=debug learns one batch by heart.",
    "max_epochs": "a run is trainer.max_steps steps long, where the learning rate's decay ends. Say that.",
    "max_time": "a run is trainer.max_steps steps long; Ctrl-C ends it earlier, with a checkpoint and a report.",
    "gradient_clip_val": "the optimiser's options say it: optim.clip_norm.",
    "accumulate_grad_batches": "it follows from data.batch_size (units a step) and data.micro_batch_size (units a "
    "forward). Say those.",
    "strategy": "it has a group of its own: strategy=single, ddp, fsdp or fsdp_hybrid.",
    "plugins": "processes, checkpoints and precision are the strategy's affair. Say strategy= and trainer.precision=.",
}


def check(run: RunConfig, *, fresh: bool = True) -> None:
    """All that can be refused at once; ``fresh`` unless a checkpoint is to be loaded.

    Raises:
        ValueError: naming the value, the rule and the remedy.
    """
    check_trainer(run)
    check_architecture(run.llm)
    check_attention(run)
    if run.llm.template not in TEMPLATES:
        hint = _near(run.llm.template, TEMPLATES)
        raise ValueError(
            f"llm.template={run.llm.template}: no such template. There are {', '.join(sorted(TEMPLATES))}.{hint}"
        )
    if fresh and run.init_from:
        require_weights(run.init_from)


def check_trainer(run: RunConfig) -> None:
    """Refuse what the Trainer does not take, what two places say, and what would break the run's promises."""
    known = inspect.signature(get_method(run.trainer["_target_"])).parameters
    for name, value in run.trainer.items():
        if name in _TAKEN:
            raise ValueError(f"trainer.{name}={value}: {_TAKEN[name]}")
        if name not in known and not name.startswith("_"):
            hint = _near(name, known, "trainer.")
            raise ValueError(f"Unknown key trainer.{name}: lightning.Trainer takes no such argument.{hint}")
    precision = str(run.trainer.get("precision") or "32-true")
    if shares_weights(run.strategy) and precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} with strategy={run.strategy.name}: there it is one of "
            f"{', '.join(PRECISIONS)}. bfloat16 needs no loss scaler, which float16 does."
        )
    there = wanted(run)
    if shares_weights(run.strategy) and there.world == 1:
        raise ValueError(
            f"strategy.kind={run.strategy.kind.name} shares weights out over processes, and trainer.devices="
            f"{run.trainer.get('devices')} is one here. Say strategy=single (strategy.kind=single with ckpt_path), or "
            "trainer.devices=2 or more."
        )
    run.data.accumulation(there.world)  # a step is as many whole micro-batches for each process
    replicas_of(run.strategy, there.world, there.nodes)


def check_architecture(llm: LLMConfig) -> None:
    """Hugging Face keeps an unknown key in silence; here it is refused, and what it refuses becomes a sentence."""
    if llm.family not in CONFIG_MAPPING:
        hint = _near(llm.family, CONFIG_MAPPING)
        raise ValueError(f"llm.family={llm.family}: transformers knows no such model type.{hint}")
    known = {*CONFIG_MAPPING[llm.family]().to_dict()}
    known |= {older for older, now in OLDER.items() if now in known}
    for key in llm.architecture:
        if key not in known:
            hint = _near(key, known, "llm.architecture.")
            raise ValueError(f"Unknown key llm.architecture.{key}: a {llm.family} has no such value.{hint}")
    try:
        text_config(llm)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        says = re.sub(r"^\w+Error: ", "", str(error).splitlines()[-1].strip())
        raise ValueError(f"llm.architecture: {says} Correct it in llm=.") from error
    pad, rows = llm.built.get("pad_token_id"), llm.built.get("vocab_size")
    if pad is not None and rows is not None and pad >= rows:
        raise ValueError(
            f"llm.architecture.pad_token_id={pad} is no row of an embedding with llm.architecture.vocab_size={rows}. "
            "Lower the one, or raise the other."
        )
    width, heads = llm.built.get("hidden_size"), llm.built.get("num_attention_heads")
    if width and heads and width % heads and not llm.built.get("head_dim"):  # not every family looks itself
        raise ValueError(
            f"llm.architecture.num_attention_heads={heads} does not divide llm.architecture.hidden_size={width}: every "
            "head takes an equal share of the width."
        )


def check_attention(run: RunConfig) -> None:
    """What kernels and the compiler need, which libraries say only once they run, or not at all."""
    precision = str(run.trainer.get("precision") or "32-true")
    gpu = run.trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    if run.llm.attention is Attention.varlen and run.compile and not (gpu and "16" in precision):
        raise ValueError(
            "compile=true with llm.attention=varlen: torch's kernel for it needs a GPU and half precision, and what "
            f"stands in for it on {'a GPU with' if gpu else 'the CPU, with'} trainer.precision={precision} cannot be "
            "compiled. Say compile=false, or llm.attention=sdpa."
        )
    dropout = text_config(run.llm).to_dict().get("attention_dropout")
    if run.llm.attention is Attention.varlen and dropout:
        raise ValueError(
            f"llm.architecture.attention_dropout={dropout} with llm.attention=varlen: torch's kernel for it drops no "
            "attention out. Set it to 0, or say llm.attention=sdpa."
        )
    _check_positions(run)
    if run.llm.attention is not Attention.flash_attention_2:
        return
    if find_spec("flash_attn") is None:
        raise ValueError(
            "llm.attention=flash_attention_2 needs the package flash-attn, which is not installed: "
            "pip install -e '.[flash]' -c constraints.txt, on a machine with a GPU and CUDA's compiler. "
            "llm.attention=varlen does the same with torch alone; llm.attention=sdpa needs nothing."
        )
    if not gpu:
        raise ValueError(
            "llm.attention=flash_attention_2 needs a GPU: say trainer=gpu where there is one, or llm.attention=sdpa."
        )
    if precision not in ("bf16-true", "16-true"):
        raise ValueError(
            f"llm.attention=flash_attention_2 computes in half precision alone, and with trainer.precision={precision} "
            "weights are in float32 where the receipt and the evaluation read them. Say trainer.precision=bf16-true, "
            "or llm.attention=varlen, which has no such rule."
        )


def _check_positions(run: RunConfig) -> None:
    """Some LLMs turn all positions of a row by factors that follow from its longest sample, so that a short one would
    be learned otherwise beside a long one.
    """
    if not rows_are_shared(run):
        return
    config = text_config(run.llm).to_dict()
    said = config.get("rope_parameters") or {}
    for rope in [said, *(each for each in said.values() if isinstance(each, dict))]:  # one, or one for a kind of layer
        kind, trained = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        trained = trained or config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        if kind in ("longrope", "dynamic") and trained and run.llm.max_length > trained:
            raise ValueError(
                f"llm.max_length={run.llm.max_length} with rope_type={kind}, data.batching={run.data.batching.name} "
                f"and llm.attention={run.llm.attention.name}: a sample of more than {trained} positions would change "
                f"the positions of every other one in its row. Set llm.max_length={trained} or less, or say "
                "data.batching=samples llm.attention=sdpa."
            )


def check_vocabulary(run: RunConfig, processor: DeepStackProcessor) -> None:
    """The tokenizer's ids are rows of the embedding; the image token's alone is never looked up there."""
    rows = int(text_config(run.llm).vocab_size)
    largest = max(id_ for token, id_ in processor.tokenizer.get_vocab().items() if token != IMAGE)
    if largest >= rows:
        raise ValueError(
            f"llm.architecture.vocab_size={rows}, but the tokenizer's largest id is {largest}: it would be looked up "
            f"beyond the embedding's last row. Use {largest + 1} or more, or the tokenizer of these weights."
        )


def _near(wrong: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
