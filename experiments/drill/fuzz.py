"""Parsers of foreign input, fed with spoiled documents: tests/fuzzing.py says what each may do with them.

    python experiments/drill/fuzz.py

Ten minutes each for shards, conversations and published configurations, two for every other parser; seeds count up
from the one that is named in the table, so that a failure can be repeated. What failed is printed with its draws.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

from drilling import ROOT, arguments, markdown, report

sys.path.append(str(ROOT / "tests"))

from fuzzing import TARGETS, tried
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

LONG = {"llava_json", "shard", "published_config"}
MINUTES, FEW = 10.0, 2.0
EXAMPLES = 200  # of one seed


def batch(name: str, number: int, count: list[int]) -> Callable[[], None]:
    @seed(number)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def examples(data: st.DataObject) -> None:
        count[0] += 1
        tried(TARGETS[name], data)

    return examples


def main() -> int:
    args = arguments(__doc__)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # libraries tell of every odd value
    rows, failed = [], []
    for name in TARGETS:
        minutes = (0.02 if args.quick else 1.0) * (MINUTES if name in LONG else FEW)
        end, count, number, what = time.monotonic() + 60 * minutes, [0], 0, "none"
        while time.monotonic() < end:
            try:
                batch(name, number, count)()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                what = f"{type(error).__name__} with seed {number}"
                failed.append({"target": name, "seed": number, "said": traceback.format_exc()})
                sys.stderr.buffer.write(failed[-1]["said"].encode(errors="backslashreplace"))
                break
            number += 1
        rows.append([name, f"{minutes:g}", f"{count[0]:,}", f"0 to {max(number - 1, 0)}", what])
        print(rows[-1], file=sys.stderr, flush=True)
    head = ["parser", "minutes", "documents", "seeds", "faults"]
    report("fuzz", "Fuzzing", [markdown(head, rows)], {"rows": rows, "failed": failed}, args)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
