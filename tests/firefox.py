"""A headless Firefox, spoken to in its Marionette protocol; no other package is needed."""

import base64
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

FIREFOX = next(filter(None, map(shutil.which, ("firefox", "firefox-esr"))), None)
_PATIENCE_SECONDS = 60
_PREFERENCES = {
    "marionette.port": 0,
    "devtools.console.stdout.content": True,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.reportingpolicy.firstRun": False,
    "network.captive-portal-service.enabled": False,
    "app.update.enabled": False,
}
_KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "End": "\ue010", "Home": "\ue011"}


class Firefox:
    """One page of one browser; it does what `browser.Browser` does, as far as it goes.

    Args:
        profile: A folder that does not exist yet.
    """

    def __init__(self, profile: Path) -> None:
        assert FIREFOX is not None
        profile.mkdir()
        lines = (f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in _PREFERENCES.items())
        (profile / "user.js").write_text("\n".join(lines))
        self._log = profile / "console.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [FIREFOX, "--headless", "--marionette", "--profile", str(profile)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._number = 0
        self._buffer = b""
        self._socket = self._connect(profile / "MarionetteActivePort")
        self._read()
        self.call("WebDriver:NewSession")

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    @property
    def complaints(self) -> list[str]:
        """What the page wrote to the console, and its errors."""
        told = ("console.", "JavaScript error: file:", "JavaScript warning: file:")
        lines = self._log.read_text().splitlines()
        # The loader of Firefox's own settings, without a network.
        own = "console.error: RSLoader"
        return [line for line in lines if line.startswith(told) and not line.startswith(own)]

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._number += 1
        text = json.dumps([0, self._number, method, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(text), text))
        _, number, error, result = self._read()
        assert (number, error) == (self._number, None), error
        return result

    def open(self, page: Path) -> None:
        """Open a file and wait until its script has run."""
        self.call("WebDriver:Navigate", url=page.resolve().as_uri())

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.call(
            "WebDriver:ExecuteScript", script="return eval(arguments[0])", args=[script]
        )
        return answer["value"]

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """As a person at the keyboard."""
        strokes = [{"type": kind, "value": _KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self.call("WebDriver:PerformActions", actions=[keyboard])

    def size(self, width: int, height: int = 900) -> None:
        """Set the window's size."""
        self.call("WebDriver:SetWindowRect", width=width, height=height)

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("WebDriver:TakeScreenshot", full=True)
        path.write_bytes(base64.b64decode(shot["value"]))

    def _connect(self, port_file: Path) -> socket.socket:
        end = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < end:
            if port_file.exists() and port_file.read_text():
                address = ("127.0.0.1", int(port_file.read_text()))
                return socket.create_connection(address, timeout=_PATIENCE_SECONDS)
            time.sleep(0.05)
        raise AssertionError("Firefox names no port")

    def _read(self) -> Any:
        while b":" not in self._buffer:
            self._receive()
        length, _, self._buffer = self._buffer.partition(b":")
        while len(self._buffer) < int(length):
            self._receive()
        text, self._buffer = self._buffer[: int(length)], self._buffer[int(length) :]
        return json.loads(text)

    def _receive(self) -> None:
        data = self._socket.recv(1 << 20)
        assert data, "Firefox has ended"
        self._buffer += data
