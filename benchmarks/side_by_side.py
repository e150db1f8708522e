"""Times functions against each other in one run: rounds of each in turn, so that what slows the machine slows all."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(cases: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """The median seconds of each case over `rounds`, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """The processor, the threads, torch's release and the device, in a line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {device}, torch {torch.__version__}"
