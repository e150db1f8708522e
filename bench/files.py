"""Files that are whole or not there."""

import os
from pathlib import Path
from uuid import uuid4


def write_if_changed(path: Path, data: bytes) -> None:
    """`write_atomically`, but a file that holds these bytes already is left untouched."""
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none of it, also when the process is killed or the power fails.

    It is written beside its place and then renamed; file and folder are flushed to disk. OSError, with the path, where
    that cannot be done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        if hasattr(os, "O_DIRECTORY"):  # the new name lies in the folder; Windows opens none
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:  # a full disk is told of by a write, which names no file
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)
