"""Between an assembled run and its training: the receipt of the whole model, what is put on it from outside, and the
forward pass of training tried.
"""

from collections.abc import Callable

import torch
from rich.console import Console

from deepstack_pl.cli.assemble import Assembly
from deepstack_pl.cli.layout import rows_are_shared
from deepstack_pl.config.run import RunConfig
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import Receipt
from deepstack_pl.inspection.rehearsal import rehearse
from deepstack_pl.inspection.witness import Testimony, compare, testify
from deepstack_pl.processes import from_first, rank
from deepstack_pl.training.compiling import compile_blocks
from deepstack_pl.training.sharding import PRECISIONS, checkpoint_activations, shard, shares_weights


def spread(run: RunConfig, work: Assembly, keep: Callable[[Receipt], None], console: Console) -> Receipt:
    """Take the receipt and hand it to ``keep``, on process 0, which has the weights; then activation checkpointing, and
    shares of the weights, proven to answer as the whole did. All processes must call it.

    Raises:
        ReceiptError: an injection does not happen, or not any more.
    """
    module, config = work.module, run.strategy
    device, shares = work.trainer.strategy.root_device, shares_weights(config)
    receipt = before = None
    if not shares:
        module.to(device)
    if rank() == 0:
        receipt, before = _of_the_whole(work, device, console) if shares else (_receipt(work), None)
        keep(receipt)
    receipt, before = from_first((receipt, before))
    assert receipt is not None
    receipt.require()
    checkpoint_activations(module.network, config.checkpointing)
    if run.compile:
        compile_blocks(module.network)
    precision, plugin = str(run.trainer.get("precision") or "32-true"), work.trainer.precision_plugin
    found = []
    if shares:
        assert before is not None
        shard(module.network, config, precision, device)
        found.append(compare(before, testify(module.network, work.processor), PRECISIONS[precision][1]))
    else:
        plugin.convert_module(module)  # as Lightning will
    several, dtype = rows_are_shared(run), _computed_in(precision)
    found.append(rehearse(module.network, work.processor, dtype, plugin.forward_context, one_row=several))
    console.print("\n".join(found), markup=False, highlight=False, soft_wrap=True)
    return receipt


def _computed_in(precision: str) -> torch.dtype:
    halves = {"bf16": torch.bfloat16, "16": torch.float16}
    return halves.get(precision.partition("-")[0], torch.float32)


def _receipt(work: Assembly) -> Receipt:
    return take_receipt(work.module.network, work.processor)


def _of_the_whole(work: Assembly, device: torch.device, console: Console) -> tuple[Receipt, Testimony]:
    """The receipt and the whole model's answers; on the device, unless it is too small for the whole."""
    for place in (device, torch.device("cpu")):
        try:
            work.module.to(place)
            return _receipt(work), testify(work.module.network, work.processor)
        except torch.OutOfMemoryError:
            console.print("one device is too small for the whole model: the receipt is taken on the CPU, which is slow")
        finally:
            work.module.cpu()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    raise AssertionError("the CPU has no OutOfMemoryError")
