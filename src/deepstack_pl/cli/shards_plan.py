"""``deepstack shards plan``: the batches of an epoch."""

from deepstack_pl.config.run import RunConfig

HELP = "the batches of an epoch, planned and counted"
EXAMPLE = "deepstack shards plan data=llava665k data.root=DIR"
OWN: dict[str, str] = {}


def run(run: RunConfig, own: dict[str, str]) -> int:
    """Plan; the exit status."""
    raise ValueError("shards plan is not here yet.")
