"""A headless Chromium, driven by chromedriver and the WebDriver protocol: real clicks, and what the console says."""

import base64
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name for an element
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


class Browser:
    """One session; `url` is that of its chromedriver."""

    def __init__(self, url: str) -> None:
        self._base = url
        options = {"browserName": "chrome", "goog:chromeOptions": {"args": _ARGUMENTS}}
        options["goog:loggingPrefs"] = {"browser": "ALL"}
        started = self._send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._base = f"{url}/session/{started['sessionId']}"

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Shows the file in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._send("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What the JavaScript returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of the element, as a person makes it."""
        found = self._send("POST", "/element", {"using": "css selector", "value": selector})
        self._send("POST", f"/element/{found[_ELEMENT]}/click")

    def console(self) -> list[str]:
        """What the console says since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """The window as a PNG, or the whole page."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def quit(self) -> None:
        """Ends the session."""
        self._send("DELETE", "")


@contextmanager
def chromium(driver: str) -> Iterator[Browser]:
    """A browser by the program `driver`; both are gone afterwards."""
    silent = subprocess.DEVNULL
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=silent, text=True) as process:
        try:
            assert process.stdout is not None
            ports = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
            port = next((found[1] for found in ports if found), None)
            assert port is not None, f"{driver} did not start"
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                yield browser
            finally:
                browser.quit()
        finally:
            process.terminate()
