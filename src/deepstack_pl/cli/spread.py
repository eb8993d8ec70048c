"""Between an assembled run and its training: the receipt of the whole model, then what is put on it from outside."""

from collections.abc import Callable

from rich.console import Console

from deepstack_pl.cli.assemble import Assembly
from deepstack_pl.config.run import RunConfig
from deepstack_pl.inspection.receipt import take_receipt
from deepstack_pl.inspection.record import Receipt
from deepstack_pl.inspection.witness import compare, testify
from deepstack_pl.processes import from_first, rank
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
    if rank() == 0 or not shares:
        module.to(device)
    if rank() == 0:
        receipt = take_receipt(module.network, work.processor)
        keep(receipt)
        before = testify(module.network, work.processor) if shares and receipt.ok else None
    receipt, before = from_first((receipt, before))
    assert receipt is not None
    receipt.require()
    checkpoint_activations(module.network, config.checkpointing)
    if shares:
        assert before is not None
        precision = str(run.trainer.get("precision") or "32-true")
        shard(module.network.cpu() if rank() == 0 else module.network, config, precision, device)
        found = compare(before, testify(module.network, work.processor), PRECISIONS[precision][1])
        console.print(found, markup=False, highlight=False, soft_wrap=True)
    return receipt
