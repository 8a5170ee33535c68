"""Headless Chromium, driven over a pipe by its DevTools protocol: a page in light, dark, at a width, and in print."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
         "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking")  # fmt: skip
SECONDS = 60  # for any answer


class Browser:
    """A browser with one page, which keeps what the page said on its console."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        # It reads from descriptor 3 and writes to 4, which may be ours for something else.
        pipes = (*os.pipe(), *os.pipe())
        theirs_in, self.ours_out, self.ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes)
        for end in pipes:
            os.close(end)
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self.ours_in, False)
        self.number, self.read, self.session = itertools.count(1), b"", None
        self.console: list[str] = []
        self.events: list[str] = []
        (page, *_) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.ours_in)
        os.close(self.ours_out)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method's result."""
        number = next(self.number)
        session = {"sessionId": self.session} if self.session else {}
        os.write(
            self.ours_out, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0"
        )
        while (message := self._message()).get("id") != number:
            pass
        assert "error" not in message, (method, message)
        return message["result"]

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.read:
            assert time.monotonic() < end, "the browser does not answer"
            try:
                self.read += os.read(self.ours_in, 2**20)
            except BlockingIOError:
                time.sleep(0.005)
        text, _, self.read = self.read.partition(b"\0")
        message = json.loads(text)
        name, params = message.get("method", ""), message.get("params", {})
        if name == "Runtime.consoleAPICalled":
            self.console.append(f"{params['type']}: {params['args']}")
        elif name == "Runtime.exceptionThrown":
            self.console.append(f"exception: {params['exceptionDetails']['text']}")
        elif name == "Log.entryAdded":
            self.console.append(f"{params['entry']['level']}: {params['entry']['text']}")
        elif name == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.console.append(f"network: {params['request']['url']}")
        self.events.append(name)
        return message

    def open(self, path: Path, *, width: int = 1280, dark: bool = False, media: str = "") -> None:
        """Load a page anew, in a window of a width in CSS pixels."""
        size = {"width": width, "height": 800, "screenWidth": width, "screenHeight": 800}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._message()

    def ask(self, script: str) -> Any:
        """What an expression of JavaScript comes to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def tab(self) -> None:
        """Press the Tab key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def picture(self, path: Path) -> None:
        """Write all of the page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page printed on A4."""
        found = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        return base64.b64decode(found["data"])
