"""A real headless Chromium, driven over the DevTools protocol: pages are opened, clicked and asked what they show."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip


class Browser:
    """One window. `errors` collects uncaught exceptions, console errors, refused resources and requests to anywhere but `allowed`."""

    def __init__(self) -> None:
        program = next((path for name in NAMES if (path := shutil.which(name))), None)
        if program is None:
            pytest.fail(f"this test needs a browser, and none of {', '.join(NAMES)} is installed; on Debian: apt-get install chromium")
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [program, *SWITCHES, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._ids = itertools.count(1)
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(connect(self._target(), max_size=None, compression=None))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(timeout=20)
        self._profile.cleanup()

    def _target(self) -> str:
        """The address of the window's debugger."""
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = port_file.read_text().split() if port_file.exists() else []
            if len(lines) == 2:
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=20) as reply:
                    pages = [target for target in json.load(reply) if target["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.05)
        pytest.fail(f"{self._process.args!r} did not start (exit status {self._process.poll()})")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command; what it returned. Events that come meanwhile are kept."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """The window's size in CSS pixels; a phone has a coarse pointer and two dots a pixel."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, address: str) -> None:
        """Go there and wait until the page says that it is ready."""
        self.call("Page.navigate", url=address)
        self.until("document.body !== null && document.body.dataset.ready === 'yes'")

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + seconds
        while not self.eval(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition} never came true; errors: {self.errors}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        """Press and release a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else "")
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def shown_ids(page: Browser) -> list[str]:
    """Questions in the list, when completions have been looked into."""
    page.until("!document.getElementById('shown').textContent.includes('looking into')")
    found: list[str] = page.eval("browser.shown.map((q) => q.id)")
    return found


def set_field(page: Browser, field: str, value: str) -> None:
    """Choose or type a value, as a person would make the page hear of it."""
    page.eval(
        f"(() => {{ const node = document.getElementById({json.dumps(field)}); node.value = {json.dumps(value)};"
        "node.dispatchEvent(new Event('input', {bubbles: true})); node.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def field_value(page: Browser, field: str) -> str:
    return str(page.eval(f"document.getElementById({json.dumps(field)}).value"))


def click(browser: Browser, selector: str) -> None:
    """A person's click, by the mouse."""
    browser.eval(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
    x, y = browser.eval(f"[{box}.left + {box}.width / 2, {box}.top + {box}.height / 2]")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


def drag(browser: Browser, selector: str) -> None:
    """A box in the middle of something, drawn with the mouse."""
    browser.eval(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
    x, y, width, height = browser.eval(f"[{box}.left, {box}.top, {box}.width, {box}.height]")
    for kind, share in (("mouseMoved", 0.3), ("mousePressed", 0.3), ("mouseMoved", 0.5), ("mouseMoved", 0.7), ("mouseReleased", 0.7)):
        place = {"x": x + share * width, "y": y + share * height}
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
    browser.eval("new Promise((done) => setTimeout(done, 300))")


def draw_all(page: Browser) -> None:
    """Draw every chart of a report, also those further down."""
    page.eval("dispatchEvent(new Event('beforeprint')); dispatchEvent(new Event('afterprint'))")
    page.until("[...report.plots.values()].every((p) => p.drawn && p.node.querySelector('.main-svg'))")
