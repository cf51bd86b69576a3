"""A page in a headless Chromium, driven over a pipe with the DevTools protocol: what went wrong, and how it looks.

with Browser() as browser:
    check_page(browser, Path("report.html"))
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on PATH (apt-get install chromium)")
WIDE, NARROW = (1280, 900), (400, 800)


class Browser:
    """One Chromium with one tab. A context manager."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads commands from file 3 and writes answers to file 4.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={self._profile}",
             "--remote-debugging-pipe", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group that was started here, with its renderers
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, **params: Any) -> Any:
        """Call `method` and return its result; what the page reports meanwhile goes to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> Any:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser ended"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, *, dark: bool = False, size: tuple[int, int] = WIDE) -> None:
        """Load a file as a window of `size` CSS pixels would, and wait until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        width, height = size
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url="about:blank")
        self.send("Runtime.evaluate", expression="1")
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; waits for a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console errors and warnings, exceptions, failed loads, and requests that leave the page's own files, since
        `open`."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(
                    "console: " + " ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"])
                )
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append("log: " + params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "about:", "blob:")):
                    found.append(f"request: {url}")
            elif method == "Network.loadingFailed":
                found.append(f"not loaded: {params.get('errorText')}")
        return found

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page as it is, all of it or what the window shows."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


# Whatever is wider than the window makes the whole page scroll sideways; boxes that scroll by themselves do not count.
_OVERFLOW = """(() => {
  const page = document.documentElement;
  if (page.scrollWidth <= page.clientWidth) return "";
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > page.clientWidth + 1 && !e.parentElement.closest(".scroll, .box, pre"));
  const names = wide.slice(0, 5).map(e => e.tagName + "." + e.className);
  return `${page.scrollWidth} > ${page.clientWidth}: ` + names.join(", ");
})()"""
_BROKEN_IMAGES = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.alt)"
_CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle(document.body);
  const [a, b] = [light(numbers(style.color)), light(numbers(style.backgroundColor))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), light(numbers(style.backgroundColor))];
})()"""


def check_page(browser: Browser, path: Path, *, script: str = "", themes: bool = True) -> None:
    """Open a page in a light and a dark theme, at a wide and a narrow window, and fail if it complains, asks for
    anything outside itself, has a broken image, scrolls sideways, or if its text cannot be read.

    Args:
        script: JavaScript that is run at each, for instance clicks.
        themes: whether the page has a dark theme.
    """
    for dark, size in ((False, WIDE), (True, WIDE), (True, NARROW), (False, NARROW)):
        browser.open(path, dark=dark, size=size)
        faults = [browser.evaluate(_OVERFLOW)]
        if script:
            browser.evaluate(script)
            faults.append(browser.evaluate(_OVERFLOW))
        faults += [f"broken image {alt!r}" for alt in browser.evaluate(_BROKEN_IMAGES)]
        contrast, ground = browser.evaluate(_CONTRAST)
        faults.append("" if contrast > 7 else f"contrast {contrast:.1f} of text and ground")
        faults.append("" if not themes or (ground < 0.2) == dark else "not in the theme that was asked for")
        faults = [fault for fault in faults + browser.complaints() if fault]
        if faults:
            where = f"{path.name}, {'dark' if dark else 'light'}, {size[0]} pixels wide"
            raise AssertionError(f"{where}: " + "; ".join(faults))
