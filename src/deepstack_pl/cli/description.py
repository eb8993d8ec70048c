"""What results.json says of a run before its first step."""

from typing import Any

from deepstack_pl.cli import provenance
from deepstack_pl.cli.assemble import Assembly
from deepstack_pl.cli.folders import relative
from deepstack_pl.config.run import RunConfig


def describe(run: RunConfig, work: Assembly) -> dict[str, Any]:
    """What is known of a run before its first step."""
    plan, per_view, parts = work.processor.plan, work.processor.tokens_per_view, work.module.parts
    assert parts is not None
    return {
        "status": "running",
        "interrupted": False,
        "max_steps": run.trainer["max_steps"],
        "init_from": relative(run.init_from) if run.init_from else None,
        "metrics": {},
        "plan": {"name": plan.name, "digest": plan.digest, "injections": [str(i) for i in plan.injections]},
        "tokens_per_image": {"seen": plan.seen_tokens(per_view), "context": plan.context_tokens(per_view)},
        "parameters": {"total": parts.parameters, "trained": parts.trained, "by_part": parts.to_dict()["parts"]},
        "steps": 0,
        "seconds": {"train": 0.0, "fit": 0.0, "evaluate": 0.0},
        "curve": [],
        "flops": 0.0,
        "tokens_per_second": None,
        "speed": {},
        "seed": run.seed,
        "data": provenance.data_of(work.train, work.val, run),
        **provenance.weight_digests(work.module.network),
        "device": provenance.device_name(work.trainer.strategy.root_device),
        "versions": provenance.versions(),
        "git": provenance.git(),
    }
