"""The state of an unfinished training on disk: the newest, and the one before it in case the newest is damaged."""

import glob
import io
import logging
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from bench.errors import UnusableInput
from bench.files import write_atomically

logger = logging.getLogger("bench")


class StateFiles:
    """The state files beside a checkpoint: `<name>.state.pt` and `<name>.state-before.pt`.

    Each is a SHA-256 digest followed by what `torch.save` wrote, read with `weights_only=True`: nothing is executed.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.newest = checkpoint.with_suffix(".state.pt")
        self.before = checkpoint.with_suffix(".state-before.pt")
        self._newest_is_whole = True

    def exist(self) -> bool:
        """Whether an unfinished training has left a state."""
        return self.newest.is_file() or self.before.is_file()

    def write(self, state: dict[str, Any]) -> None:
        """Make `state` the newest one, and the newest one the one before, unless that is known to be damaged."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if self.newest.is_file() and self._newest_is_whole:
            self.newest.replace(self.before)
        write_atomically(self.newest, sha256(buffer.getvalue()).digest() + buffer.getvalue())
        self._newest_is_whole = True

    def read(self, key: object, device: torch.device) -> dict[str, Any] | None:
        """The newest undamaged state, whose entry `key` must be the given one; None where there is no file.

        Raises:
            UnusableInput: the state belongs to another training, or every file is damaged.
        """
        paths = [path for path in (self.newest, self.before) if path.is_file()]
        for path in paths:
            state = _load(path, device)
            if state is None:
                logger.warning("'%s' is damaged or not a state of bench: using the state before it", path)
                self._newest_is_whole = False
                continue
            if state["key"] != key:
                raise UnusableInput(
                    f"'{path}' belongs to another spec, other data or another number of processes: pass the same"
                    " options, or remove it with --restart"
                )
            return state
        if paths:
            raise UnusableInput(f"'{paths[0]}' is damaged or not a state of bench: start again with --restart")
        return None

    def recorded(self, name: str) -> Any:
        """An entry of the newest undamaged state, whichever training's; None where there is none."""
        states = (_load(path, torch.device("cpu")) for path in (self.newest, self.before) if path.is_file())
        return next((state.get(name) for state in states if state is not None), None)

    def remove(self) -> None:
        """Remove the states, and temporary files of a training that was killed while it wrote one."""
        name = glob.escape(self.checkpoint.stem)
        for path in (self.newest, self.before, *self.checkpoint.parent.glob(f".{name}.*")):
            path.unlink(missing_ok=True)


def _load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state in a file; None for one that is truncated, changed, or was not written by `StateFiles.write`."""
    data = path.read_bytes()
    size = sha256().digest_size
    if sha256(data[size:]).digest() != data[:size]:
        return None
    try:
        return torch.load(io.BytesIO(data[size:]), map_location=device, weights_only=True)
    except UnpicklingError:  # the digest is right, and yet it holds more than tensors and plain values
        return None
