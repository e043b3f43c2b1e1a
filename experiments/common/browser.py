"""A browser, to look at pages: Debian's chromium, driven over HTTP by its chromedriver.

The protocol is W3C's WebDriver, of which a few commands are enough; no package is needed.
"""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, by the protocol
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    """One tab."""

    def __init__(self, session):
        """Takes the address of a session."""
        self._session = session

    def command(self, path, method="POST", **body):
        """Sends a command and returns its value."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._session}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.loads(error.read())["value"]["message"]) from None

    def open(self, path):
        """Loads a page from disk, and waits until its scripts have run."""
        self.command("/url", url=Path(path).resolve().as_uri())

    def run(self, script, *args):
        """Returns what a script returns."""
        return self.command("/execute/sync", script=script, args=list(args))

    def find(self, selector):
        """The first element of a CSS selector."""
        return self.command("/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector):
        """Clicks on an element, which has to be visible."""
        self.command(f"/element/{self.find(selector)}/click")

    def keys(self, selector, text):
        """Sends keys to an element, which gets the focus."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.command("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def drag(self, selector, x, y, *, kind="mouse"):
        """Moves an element by a pointer, from its centre by x and y pixels."""
        origin = {ELEMENT: self.find(selector)}
        steps = [
            {"type": "pointerMove", "origin": origin, "x": 0, "y": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "origin": "pointer", "x": x, "y": y, "duration": 100},
            {"type": "pointerUp", "button": 0},
        ]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self.command("/actions", actions=[{**pointer, "actions": steps}])

    def resize(self, width, height, *, dark=False):
        """Sets the size of the page, and whether it is dark."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def devtools(self, name, **parameters):
        """Sends a command of Chromium's own protocol."""
        return self.command("/goog/cdp/execute", cmd=name, params=parameters)

    def screenshot(self, path, *, height):
        """Saves the visible part of a page as a PNG, from where it is scrolled to."""
        width, top = self.run("return [innerWidth, scrollY]")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        picture = self.devtools("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def messages(self):
        """Warnings and errors of the console since the last call."""
        return self.command("/se/log", type="browser")


@contextlib.contextmanager
def open_browser():
    """Starts a driver and a headless browser, and ends both."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            port = next(
                match[1] for line in driver.stdout if (match := re.search(r"on port (\d+)\.", line))
            )
            options = {
                "browserName": "chrome",
                "goog:loggingPrefs": {"browser": "ALL"},
                "goog:chromeOptions": {
                    "binary": shutil.which("chromium"),
                    "args": [
                        "--headless=new",
                        "--no-sandbox",
                        "--disable-gpu",
                        "--disable-dev-shm-usage",
                    ],
                },
            }
            address = f"http://127.0.0.1:{port}/session"
            started = Browser(address).command("", capabilities={"alwaysMatch": options})
            browser = Browser(f"{address}/{started['sessionId']}")
            try:
                yield browser
            finally:
                browser.command("", "DELETE")
        finally:
            driver.terminate()
