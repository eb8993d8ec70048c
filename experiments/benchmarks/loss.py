"""The loss of learned tokens: all logits, ours in chunks, and torch's chunked ``linear_cross_entropy``.

A head of 8,192 rows on hidden states of 512 numbers, 2,048 positions of which 30 % are learned; forward and backward to
the hidden states and the head. One thread, CPU time, in turns; memory of a process of its own. The error is of the mean
loss in bfloat16, against float64.

    python experiments/benchmarks/loss.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import arguments, in_turns, markdown, peak_during, peak_of, ratio, report
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from deepstack_pl.language import loss

WAYS = ("all logits", "ours", "torch's linear_cross_entropy")
Sizes = tuple[int, int, int]


def made(sizes: Sizes) -> tuple[LlamaForCausalLM, Tensor, Tensor, Tensor]:
    positions, width, vocabulary = sizes
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=1, vocab_size=vocabulary)
    llm = LlamaForCausalLM(config)
    hidden = torch.randn(positions, width)
    labels = torch.randint(0, vocabulary, (positions,))
    learned_at = torch.randperm(positions)[: int(0.3 * positions)].sort().values
    return llm, hidden, labels, learned_at


def ways(
    llm: LlamaForCausalLM, hidden: Tensor, labels: Tensor, learned_at: Tensor, chunk: int
) -> dict[str, Callable[[], Tensor]]:
    masked = torch.full_like(labels, -100)
    masked[learned_at] = labels[learned_at]
    loss.AT_ONCE = chunk * llm.config.vocab_size

    def of(compute: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            llm.zero_grad()
            given = hidden.clone().requires_grad_()
            total = compute(given)
            total.backward()
            return total.detach()

        return step

    def ours(given: Tensor) -> Tensor:
        return loss.losses_after(llm, given[learned_at], labels[learned_at]).sum()

    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    head = llm.lm_head.weight
    everywhere = of(lambda given: F.cross_entropy(llm.lm_head(given).float(), masked, reduction="sum"))
    theirs = of(
        lambda given: F.linear_cross_entropy(
            given[learned_at], head, labels[learned_at], reduction="sum", options=options
        )
    )
    return dict(zip(WAYS, (everywhere, of(ours), theirs), strict=True))


def sizes_of(*, quick: bool) -> tuple[Sizes, int]:
    return ((256, 64, 512), 32) if quick else ((2048, 512, 8192), 128)


def main() -> None:
    args = arguments(__doc__, repetitions=7)
    sizes, chunk = sizes_of(quick=args.quick)
    given = made(sizes)
    work = ways(*given, chunk)
    plain, *others = (way() for way in work.values())
    if any(abs(float(other / plain) - 1) > 1e-5 for other in others):
        raise SystemExit(f"the losses differ: {plain}, {others}.")
    times = in_turns(work, args.repetitions, time.process_time)
    words = ["--quick"] if args.quick else []
    memory = {way: peak_of(__file__, "peak", way, *words) for way in WAYS}
    llm, hidden, labels, learned_at = given
    exact = F.cross_entropy(
        (hidden.bfloat16() @ llm.lm_head.weight.bfloat16().T)[learned_at].double(), labels[learned_at], reduction="sum"
    )
    halves = ways(llm.bfloat16(), hidden.bfloat16(), labels, learned_at, chunk)
    errors = {way: abs(float(step()) - float(exact.detach())) / len(learned_at) for way, step in halves.items()}
    first = WAYS[0]
    rows = [
        [
            way,
            f"{statistics.median(times[way]):.3f}",
            ratio(times[way], times[first]),
            f"{memory[way] / 2**20:.0f}",
            f"{errors[way]:.1e}",
        ]
        for way in WAYS
    ]
    head = ["loss", "median s", "times that of all logits", "MiB", "error in bfloat16, a token"]
    report("loss", "The loss of learned tokens", [markdown(head, rows)], {"s": times, "B": memory}, args)


def peak(way: str, *, quick: bool) -> None:
    sizes, chunk = sizes_of(quick=quick)
    work = ways(*made(sizes), chunk)[way]
    print(peak_during(work))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], quick="--quick" in sys.argv)
    else:
        main()
