"""Archives come from the data root, or are downloaded into it whole or not at all."""

import hashlib
import socket
import tarfile
from functools import partial
from http.client import RemoteDisconnected
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import URLError

import pytest

from bench.datasets.download import TIMEOUT_SECONDS, archive_folder, offline
from bench.errors import UnusableInput

URL = "https://example.invalid/set.tar.gz"
DOWNLOAD = "torchvision.datasets.utils.download_and_extract_archive"


def asked(root: Path) -> Path:
    return archive_folder(root, "set", URL, "0" * 32)


def test_what_is_there_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: pytest.fail("downloaded"))
    (tmp_path / "set").mkdir()
    assert asked(tmp_path) == tmp_path / "set"


def test_nothing_is_downloaded_without_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(UnusableInput, match=r"^data root .*gone is not a folder: create it to download set there"):
        asked(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(UnusableInput, match=r"file is not a folder"):
        asked(tmp_path / "file")


def test_a_download_appears_under_its_name_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(url: str, folder: str, md5: str) -> None:
        assert (url, md5, socket.getdefaulttimeout()) == (URL, "0" * 32, TIMEOUT_SECONDS)
        print("what a library prints")
        (Path(folder) / "set").mkdir()
        (Path(folder) / "set" / "images").touch()
        (Path(folder) / "set.tar.gz").touch()
        assert not (tmp_path / "set").exists()

    monkeypatch.setattr(DOWNLOAD, download)
    before = socket.getdefaulttimeout()
    assert asked(tmp_path) == tmp_path / "set"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["images"]
    assert socket.getdefaulttimeout() == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"downloading {URL} to {tmp_path}\n")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (URLError("Name or service not known"), "Name or service not known"),
        (RuntimeError("File not found or\ncorrupted."), "File not found or corrupted."),
        (TimeoutError("timed out"), "timed out"),
        (RemoteDisconnected("closed"), "closed"),
    ],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(
    error: Exception, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, folder: str, md5: str) -> None:
        (Path(folder) / "half").touch()
        raise error

    monkeypatch.setattr(DOWNLOAD, download)
    before = socket.getdefaulttimeout()
    with pytest.raises(UnusableInput) as refused:
        asked(tmp_path)
    advice = f"unpack it in {tmp_path}, or pass --data-root DIR"
    assert str(refused.value) == f"{tmp_path}/set is missing, and downloading {URL} failed ({why}): {advice}"
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_an_archive_of_another_content_is_refused(tmp_path: Path) -> None:
    """By torchvision's own check of the MD5, over HTTP."""
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    packed = tmp_path / "from" / "set.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(__file__, "set/file.py")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "from")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set.tar.gz"
        with pytest.raises(UnusableInput, match=r"to/set is missing, and downloading http:.* failed \(.*corrupted"):
            archive_folder(tmp_path / "to", "set", url, "0" * 32)
        assert list((tmp_path / "to").iterdir()) == []
        folder = archive_folder(tmp_path / "to", "set", url, hashlib.md5(packed.read_bytes()).hexdigest())
        server.shutdown()
    assert (folder / "file.py").read_bytes() == Path(__file__).read_bytes()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["set"]


def test_offline_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: pytest.fail("it was downloaded"))
    with offline(), pytest.raises(UnusableInput, match=r"/set is missing: pass --data-root DIR$"):
        asked(tmp_path)
