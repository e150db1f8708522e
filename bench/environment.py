"""Where a number was measured: versions, device, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Self

from bench.errors import UnusableInput

PACKAGES = ("torch", "torchvision", "timm", "torchattacks", "pyautoattack", "robustbench", "numpy", "lightning-fabric")


@cache
def git_hash() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is installed in a checkout of something else
        # Results and boards are what the code writes, and weights have a hash of their own: neither is another code.
        code = (".", "../models", ":(exclude)../models/zoo", "../pyproject.toml")
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def versions() -> dict[str, str]:
    """Installed versions of what decides a verdict; 'missing' where it is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def environment(device: str, threads: int) -> dict[str, str]:
    """Versions, machine, device and the threads of a process, all as text."""
    machine = f"{platform.system()} {platform.machine()}"
    return {**versions(), "machine": machine, "device": device, "threads": str(threads)}


class World(NamedTuple):
    """Which of several processes this is, by torchrun's variables; one alone where these are not set.

    The variables of a batch system such as Slurm are not read: with `srun torchrun …` it starts several.
    """

    rank: int
    processes: int
    machines: int
    local_rank: int

    @classmethod
    def here(cls) -> Self:
        """From the environment; UnusableInput, naming the variable, for one that cannot be."""
        processes = _number("WORLD_SIZE", 1, least=1)
        if processes > 1 and not os.environ.get("RANK"):
            raise UnusableInput(
                f"WORLD_SIZE is {processes}, but RANK is not set: start the command with"
                f" `torchrun --nproc-per-node {processes} -m bench …`, or unset WORLD_SIZE to run one process"
            )
        rank = _number("RANK", 0)
        if rank >= processes > 1:
            raise UnusableInput(f"RANK {rank} is not below WORLD_SIZE {processes}: start the command with torchrun")
        own = _number("LOCAL_WORLD_SIZE", processes, least=1)
        return cls(rank, processes, max(1, processes // own), _number("LOCAL_RANK", rank))


def _number(name: str, default: int, least: int = 0) -> int:
    """A variable of the environment that is a whole number; `default` where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UnusableInput(f"{name} '{text}' is no whole number from {least} on: unset it, or start with torchrun")
    return int(text)


def torch_device(device: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:i` as torch's name of a device; UnusableInput for what is not there.

    Without a number, each of a machine's processes takes its own.
    """
    import torch  # here, since boards and checks must not import it

    kind, _, index = device.partition(":")
    if kind == "auto" and not index:
        return f"cuda:{World.here().local_rank}" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and not index:
        return "cpu"
    if kind != "cuda" or not (index.isascii() and (index or "0").isdigit()):
        raise UnusableInput(f"unknown device '{device}': there are auto, cpu, cuda, cuda:0 …")
    if int(index or 0) >= torch.cuda.device_count():
        raise UnusableInput(
            f"device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices, take cpu"
        )
    return f"cuda:{index or World.here().local_rank}"
