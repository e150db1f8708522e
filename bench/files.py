"""Files that are whole or not there."""

import os
from pathlib import Path
from uuid import uuid4


def write_if_changed(path: Path, data: bytes) -> None:
    """`write_atomically`, but a file that holds these bytes already is left untouched."""
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none of it, also when the process is killed: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
