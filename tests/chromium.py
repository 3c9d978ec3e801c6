"""A page in a real headless Chromium, by the DevTools protocol: what it says, loads, draws, how it looks.

One browser serves many pages. `Chromium.open` gives a page at a width and in a scheme of colours; console
messages, exceptions and every request are collected from before the page is loaded.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
_PATIENCE_S = 60.0


@dataclass
class Page:
    """One loaded page. `said`: console messages and exceptions. `requests`: the addresses it asked for."""

    browser: Chromium
    session: str
    target: str
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **values)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is worth here."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, however long, as PNG."""
        taken = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self.browser.ask("Target.closeTarget", targetId=self.target)
        self.browser.pages.pop(self.session)


class Chromium:
    """A running browser with a profile of its own; a context."""

    def __init__(self) -> None:
        assert PROGRAM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        told = Path(self._profile.name) / "DevToolsActivePort"
        self._process = subprocess.Popen(
            [PROGRAM, *_OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pages: dict[str, Page] = {}
        self._number = 0
        self._open = ExitStack()
        end = time.monotonic() + _PATIENCE_S
        while not (told.is_file() and told.read_text().count("\n")):
            assert self._process.poll() is None, f"{PROGRAM} ended with {self._process.returncode}"
            assert time.monotonic() < end, f"{PROGRAM} opened no port"
            time.sleep(0.05)
        port, path = told.read_text().splitlines()[:2]
        speaking = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None, proxy=None)
        self._socket = self._open.enter_context(speaking)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def ask(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """One call of the protocol and its answer; events that come meanwhile go to their pages."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": values}
        self._socket.send(json.dumps(asked | ({"sessionId": session} if session else {})))
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                found: dict[str, Any] = message["result"]
                return found

    def open(self, file: Path, width: int = 1280, *, dark: bool = False, height: int = 800) -> Page:
        """The file's page, loaded, in a window of so many CSS pixels."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Page.navigate", url=file.resolve().as_uri())
        end = time.monotonic() + _PATIENCE_S
        while page.value("location.href + document.readyState") != f"{file.resolve().as_uri()}complete":
            assert time.monotonic() < end, f"{file} did not load"
            time.sleep(0.02)
        return page

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=_PATIENCE_S))
        page = self.pages.get(message.get("sessionId", ""))
        if page is not None:
            _note(page, message.get("method", ""), message.get("params", {}))
        return message


def _note(page: Page, method: str, values: dict[str, Any]) -> None:
    if method == "Runtime.consoleAPICalled":
        page.said.append(json.dumps(values["args"]))
    elif method == "Runtime.exceptionThrown":
        page.said.append(json.dumps(values["exceptionDetails"]))
    elif method == "Log.entryAdded":
        page.said.append(values["entry"]["text"])
    elif method == "Network.requestWillBeSent":
        page.requests.append(values["request"]["url"])
