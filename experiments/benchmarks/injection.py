"""Injection overhead: an LLM's forward and backward with DeepStack-L's groups and without, on the same sequence.

Four groups for an image of 256 tokens, before layers 1 to 4 of 12, in sequences of 544 positions, gradients to the
groups included. Both are the same model: without, no group is handed to the layers. One thread, CPU time, in turns.

    python experiments/benchmarks/injection.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import statistics
import time

import torch
from harness import arguments, in_turns, markdown, ratio, report
from sizes import STACKED, llm_of, model_of, vision_of

from deepstack_pl.language.host import CARRIER, Carrier

TARGET = 1.02


def main() -> None:
    args = arguments(__doc__, repetitions=14)
    torch.set_num_threads(1)
    llm = llm_of(layers=6, width=64, heads=2) if args.quick else llm_of()
    model = model_of(STACKED, llm, vision_of(patches=4)).language_model
    rows, text, tokens, width = 1, 288, 256, int(llm.architecture["hidden_size"])
    index = torch.full((rows, tokens + text), -1)
    index[:, :tokens] = torch.arange(rows * tokens).view(rows, tokens)
    embeds = torch.randn(rows, tokens + text, width) * 0.02
    groups = torch.randn(4, rows * tokens, width) * 0.02
    labels = torch.randint(0, 100, (rows, tokens + text))

    def step(injected: bool) -> torch.Tensor:
        model.zero_grad()
        given, features = embeds.clone().requires_grad_(), groups.clone().requires_grad_()
        carrier = {CARRIER: Carrier(features=features, index=index, scales=None, traces=None)} if injected else {}
        loss = model(inputs_embeds=given, labels=labels, use_cache=False, **carrier).loss
        loss.backward()
        if injected and not (features.grad is not None and bool(features.grad.any())):
            raise SystemExit("the groups have no gradient: nothing was injected, and there is nothing to compare.")
        return loss.detach()

    if torch.equal(step(True), step(False)):
        raise SystemExit("the loss is the same with groups and without: nothing was injected.")
    times = in_turns({"with": lambda: step(True), "without": lambda: step(False)}, args.repetitions, time.process_time)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    table = markdown(
        [
            "LLM, forward and backward",
            "least s",
            "median s",
            "times as long: by the least",
            "by turns (least to most)",
            "target",
        ],
        [
            ["without groups", *_seconds(times["without"]), "1", "1", ""],
            [
                "DeepStack-L, four groups",
                *_seconds(times["with"]),
                f"{min(times['with']) / min(times['without']):.3f}",
                ratio(times["with"], times["without"]),
                TARGET,
            ],
        ],
    )
    about = f"{size:.1f} million parameters, {rows} row of {tokens + text} positions, {tokens} of them visual."
    report("injection", "Injection overhead", [about, table], times, args)


def _seconds(times: list[float]) -> list[str]:
    return [f"{min(times):.3f}", f"{statistics.median(times):.3f}"]


if __name__ == "__main__":
    main()
