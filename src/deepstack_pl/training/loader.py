"""A loader that says how long its consumer waited."""

import time
from collections.abc import Iterable, Iterator

from deepstack_pl.batch import MultimodalBatch


class TimedLoader:
    """A loader that counts the seconds its consumer waits.

    Its length is that of the whole run, what came before a resume included: so counts Lightning, which would begin the
    loader anew at the end of a shorter one.

    Attributes:
        waited: seconds spent in ``next``, since it was made.
    """

    def __init__(self, loader: Iterable[MultimodalBatch], length: int) -> None:
        self.loader = loader
        self.length = length
        self.waited = 0.0

    def __len__(self) -> int:
        return self.length

    def close(self) -> None:
        """Let go of the loader, whose workers end with it."""
        self.loader = ()

    def __iter__(self) -> Iterator[MultimodalBatch]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch
