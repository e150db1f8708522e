"""Where an archive lies under the data root, and how it gets there."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.errors import UnusableInput

_offline = False
TIMEOUT_SECONDS = 30.0  # without one, a firewall that drops packets holds the command for minutes


def archive_folder(root: Path, folder: str, url: str, md5: str) -> Path:
    """`root/folder`, downloaded from `url` first where the root exists and the folder does not.

    UnusableInput if there is no root (nothing is downloaded then), `offline`, or if the download fails.
    """
    if not root.is_dir():
        raise UnusableInput(
            f"data root {root} is not a folder: create it to download {folder} there, pass --data-root DIR, or set"
            " BENCH_DATA_ROOT to one"
        )
    path = root / folder
    if not path.exists():
        if _offline:
            raise UnusableInput(f"{path} is missing: pass --data-root DIR")
        _download(path, url, md5)
    return path


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is downloaded inside: what is missing is refused."""
    global _offline
    before, _offline = _offline, True
    try:
        yield
    finally:
        _offline = before


def _download(path: Path, url: str, md5: str) -> None:
    # torchvision is heavy, and whoever has the data does not need it
    from torchvision.datasets.utils import download_and_extract_archive

    print(f"downloading {url} to {path.parent}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        # unpacked aside and then renamed: an interrupted download leaves nothing that looks like the archive
        with TemporaryDirectory(dir=path.parent, prefix=".download-") as aside, redirect_stdout(sys.stderr):
            download_and_extract_archive(url, aside, md5=md5)
            (Path(aside) / path.name).rename(path)
    except (OSError, RuntimeError, HTTPException) as error:
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise UnusableInput(
            f"{path} is missing, and downloading {url} failed ({why}): "
            f"unpack it in {path.parent}, or pass --data-root DIR"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
