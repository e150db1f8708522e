"""What every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds the public archives; a test that needs one is skipped where there is none.

    It is $BENCH_DATA_ROOT, or shared/data beside the repository.
    """
    root = Path(os.environ.get("BENCH_DATA_ROOT") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no data at {root}: set BENCH_DATA_ROOT to a folder that holds the archives")
    return root
