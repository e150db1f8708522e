"""Everything that computes is right for a device of its own: run on a pretend one, with the CPU's results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("device", ["pretend", "cuda"])
def test_everything_that_computes_runs_on_a_device_of_its_own(device):
    """In a process of its own, since torch cannot forget a device. What is run is listed in device_checks.py."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, *sys.path)))
    done = subprocess.run(
        [sys.executable, TESTS / "device_checks.py", "--device", device],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) > 24
    failed = {name: error for name, error in outcomes.items() if error}
    assert not failed, "\n".join(f"{name}: {error[-2000:]}" for name, error in failed.items())
