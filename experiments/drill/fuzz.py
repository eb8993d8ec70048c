"""Parsers of foreign input, fed with spoiled documents: tests/fuzzing.py says what each may do with them.

    python experiments/drill/fuzz.py [PARSER ...]

Ten minutes each for shards, conversations and published configurations, two for every other parser; seeds count up
from the one that is named in the table, so that a failure can be repeated. What failed is printed with its draws. Where
parsers are named, theirs alone are the rows that change. More memory than `MEMORY` is a fault, too.
"""

import json
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from drilling import ROOT, commit, markdown, parser_of, report

sys.path.append(str(ROOT / "tests"))

from fuzzing import TARGETS, tried
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

LONG = {"llava_json", "shard", "published_config"}
MINUTES, FEW = 10.0, 2.0
EXAMPLES = 200  # of one seed
MEMORY = 4 * 2**30  # bytes that this program may take


def batch(name: str, number: int, count: list[int]) -> Callable[[], None]:
    @seed(number)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def examples(data: st.DataObject) -> None:
        count[0] += 1
        tried(TARGETS[name], data)

    return examples


def minutes_of(name: str, quick: bool) -> float:
    return (0.02 if quick else 1.0) * (MINUTES if name in LONG else FEW)


def fuzzed(name: str, minutes: float) -> dict[str, Any]:
    """A row of the table, and what was said where it ends with a fault."""
    end, count, number, what, said = time.monotonic() + 60 * minutes, [0], 0, "none", ""
    while time.monotonic() < end:
        try:
            batch(name, number, count)()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            what, said = f"{type(error).__name__} with seed {number}", traceback.format_exc()
            sys.stderr.buffer.write(said.encode(errors="backslashreplace"))
            break
        number += 1
    row = [name, f"{minutes:g}", f"{count[0]:,}", f"0 to {max(number - 1, 0)}", what, commit()]
    print(row, file=sys.stderr, flush=True)
    return {"row": row, "said": said}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "parsers", nargs="*", metavar="PARSER", help=f"of {', '.join(TARGETS)}; all where none is named"
    )
    args = parser.parse_args()
    if unknown := set(args.parsers) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: no such parser. There are {', '.join(TARGETS)}.")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # libraries tell of every odd value
    file = args.out / "fuzz.json"
    found = json.loads(file.read_text()) if args.parsers and file.is_file() else {}
    for name in args.parsers or TARGETS:
        found[name] = fuzzed(name, minutes_of(name, args.quick))
    found = {name: found[name] for name in TARGETS if name in found}
    head = ["parser", "minutes", "documents", "seeds", "faults", "after commit"]
    report("fuzz", "Fuzzing", [markdown(head, [each["row"] for each in found.values()])], found, args)
    return 1 if any(each["said"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
