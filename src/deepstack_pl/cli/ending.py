"""How a process of several ends: with its own exit status. Loads without torch."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


def end_now(main: Callable[..., int], *args: Any) -> NoReturn:
    """Call ``main`` and end with its status, past Python's own taking apart: threads of torch's process groups that it
    meets there abort the process now and then, and a batch system would be told of a crash.
    """
    try:
        status = main(*args)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
