"""Children of a program that has imported what they need, which takes longer than what they do."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def forked(work: Callable[[], Any]) -> int:
    """The process number of a child that does the work.

    It exits with 0, or with what sys.exit was given, or with 1 after a traceback on standard error.
    """
    if child := os.fork():
        return child
    status: Any = 1
    try:
        work()
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
