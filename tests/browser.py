# SPDX-License-Identifier: MIT
"""A headless Chromium over its debugging pipe: no driver, no port, no package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needed = pytest.mark.skipif(CHROMIUM is None, reason="notice: no chromium; apt-get install chromium runs these tests")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PATIENCE_S = 60.0


class Browser:
    """One process with one tab at a time.

    `requests` are the addresses that the page asked for, `blocked` those of them that its policy stopped, `errors`
    what console and policy complained about, `dialogs` the texts of alerts.
    """

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        child = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]

        # the pipe is file descriptors 3 and 4 of the browser
        wire = ["bash", "-c", f'exec "$@" 3<&{child[0]} 4>&{child[1]}', "bash"]
        command = [*wire, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        log = (profile.parent / "chromium.log").open("wb")
        self._process = subprocess.Popen(command, pass_fds=child, stdout=log, stderr=log)
        for fd in (theirs_in, theirs_out, *child):
            os.close(fd)
        log.close()
        self._in, self._out, self._buffer, self._id = ours_in, ours_out, b"", 0
        self._asked: dict[str, str] = {}
        self.requests: list[str] = []
        self.blocked: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Result of a command."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == self._id)["result"]

    def _until(self, wanted):
        end = time.monotonic() + PATIENCE_S
        while True:
            message = self._next(end)
            if message is None:
                raise TimeoutError("the browser did not answer")
            if wanted(message):
                if "error" in message:
                    raise RuntimeError(message["error"]["message"])
                return message

    def _next(self, end: float):
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._in, 1 << 20)
            if not data:
                raise ConnectionError("the browser is gone")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
                self._asked[params["requestId"]] = params["request"]["url"]
            case "Network.loadingFailed" if params.get("blockedReason") == "csp":
                self.blocked.append(self._asked[params["requestId"]])
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"]))[:400])
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.dialogs.append(params["message"])
                self._id += 1
                answer = {"id": self._id, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                os.write(self._out, json.dumps(answer | {"sessionId": self._session}).encode() + b"\0")
        return message

    def size(self, width: int, height: int, dark: bool = False, phone: bool = False, scale: float = 1) -> None:
        """Viewport in CSS pixels and the colours that the user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Load a page and wait until its script is done; forgets what earlier pages asked for."""
        self.requests, self.blocked, self.errors, self.dialogs = [], [], [], []
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.ready")

    def run(self, script: str):
        """Value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, condition: str):
        """The value of an expression once it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.run(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}; {self.errors}")
        return value

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def shoot(self, path: Path, full: bool = False) -> None:
        """A PNG of the page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except (ConnectionError, TimeoutError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
