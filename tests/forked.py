"""Children of a program that has imported what they need, which takes longer than what they do.

What commands import when they are called is imported here, once for all children.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sklearn.datasets  # noqa: F401
import torchattacks  # noqa: F401

from bench import progress  # noqa: F401
from bench.boards import leaderboard  # noqa: F401
from bench.certify import run  # noqa: F401
from bench.evaluation import evaluate, plan  # noqa: F401
from bench.training import loop  # noqa: F401


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
