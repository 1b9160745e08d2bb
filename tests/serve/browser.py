"""A real Chromium, driven through its debugging pipe: no driver and no package is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One window. Its protocol: JSON messages that end with a zero byte, on descriptors 3 and 4 of the browser."""

    def __init__(self, profile: Path, width: int = 900, height: int = 700) -> None:
        assert CHROMIUM is not None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        options += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--no-first-run", "about:blank"]

        def place() -> None:
            os.dup2(os.dup(to_browser), 3)
            os.dup2(os.dup(from_browser), 4)

        high = [os.dup(fd) for fd in (to_browser, from_browser)]  # away from 3 and 4
        os.close(to_browser)
        os.close(from_browser)
        to_browser, from_browser = high
        self.process = subprocess.Popen(
            [CHROMIUM, *options],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in high:
            os.close(fd)
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.fulfil: dict[str, Any] | None = None  # how to answer paused requests
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        value: dict[str, Any] = json.loads(message)
        return value

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._number

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, **parameters)
        while True:
            message = self._receive()
            if message.get("method") == "Fetch.requestPaused" and self.fulfil is not None:
                self._send("Fetch.fulfillRequest", requestId=message["params"]["requestId"], **self.fulfil)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression as soon as it is true; the test's timeout is the only clock."""
        while not (value := self.run(script)):
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.run("window.isOld = true")  # so that the page before, which may have the same address, is not taken for this one
        self.call("Page.navigate", url=url)
        self.until("window.isOld === undefined && document.readyState === 'complete' && location.href !== 'about:blank'")

    def type(self, text: str) -> None:
        """Into what has the focus, then Enter."""
        self.call("Input.insertText", text=text)
        self.key("Enter", 13, "\r")

    def key(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)
