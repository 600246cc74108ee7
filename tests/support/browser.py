"""Chromium without a window, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

__all__ = ["Browser", "find_axe", "find_browser", "running_browser"]

_ROOT = Path(__file__).parent.parent.parent

_TIMEOUT_SECONDS = 60  # for operations of a second, on a busy machine
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver marks an element in JSON


def find_browser() -> tuple[str, str] | None:
    """The paths of chromedriver and Chromium; None if either is missing."""
    driver = shutil.which("chromedriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    return None if driver is None or browser is None else (driver, browser)


def find_axe() -> Path | None:
    """axe-core, which audits pages for accessibility, as npm installs it beside the checkout; None if it did not."""
    path = _ROOT / "node_modules" / "axe-core" / "axe.min.js"
    return path if path.is_file() else None


class Browser:
    """One window."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._path = f"/session/{session}"

    def open(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; returns what it returns."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def type(self, selector: str, text: str) -> None:
        """Type into the element at ``selector``, as with the keyboard."""
        self._call("POST", f"/element/{self._element(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._element(selector)}/click")

    def text(self, selector: str) -> str:
        """The texts of all elements at ``selector``, a line for each."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('\\n')"
        return str(self.run(script, selector))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until ``condition`` is true."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not (value := condition()):
            assert time.monotonic() < deadline, f"it did not happen: {self.text('body')}"
        return value

    @contextmanager
    def screen(
        self, width: int = 1280, height: int = 800, *, dark: bool = False, scale: float = 1
    ) -> Iterator[None]:
        """During the block, have a screen of this size, also one narrower than a window may be, and light or dark pages."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": scale,
            "mobile": width < 600,
        }
        self._command("Emulation.setEmulatedMedia", features=features)
        self._command("Emulation.setDeviceMetricsOverride", **metrics)
        try:
            yield
        finally:
            self._command("Emulation.setEmulatedMedia", features=[])
            self._command("Emulation.clearDeviceMetricsOverride")

    def audit(self) -> list[str]:
        """What axe-core finds wrong with the page as it is now, from serious on; None of it is waived."""
        path = find_axe()
        assert path is not None
        # The driver evaluates it outside of the page's security policy.
        self.run(f"if (!window.axe) {{ {path.read_text(encoding='utf-8')} }}")
        found = self.run("return axe.run(document, { resultTypes: ['violations'] })")
        assert found["passes"], "nothing was audited"
        return [
            f"{each['id']}: {node['html']}: {node['failureSummary']}"
            for each in found["violations"]
            if each["impact"] in {"serious", "critical"}
            for node in each["nodes"]
        ]

    def picture(self, path: Path) -> None:
        """Write what is seen to a PNG file."""
        import base64

        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def console(self) -> list[str]:
        """What was written to the console since it was asked for last: errors, and breaches of the page's policy."""
        return [each["message"] for each in self._call("POST", "/se/log", type="browser")]

    def requested(self) -> set[str]:
        """The hosts of which anything was requested since it was asked for last."""
        log = self._call("POST", "/se/log", type="performance")
        sent = [each["message"] for each in log if "Network.requestWillBeSent" in each["message"]]
        return set(re.findall(r'"url":"\w+://([^/"]+)', "".join(sent)))

    def _command(self, command: str, **parameters: Any) -> None:
        """Give a command of Chromium's own protocol."""
        self._call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def _element(self, selector: str) -> str:
        found = self._call("POST", "/element", using="css selector", value=selector)
        return str(found[_ELEMENT])

    def _call(self, method: str, path: str, **body: Any) -> Any:
        response = self._http.request(
            method, self._path + path, json=body or ({} if method == "POST" else None)
        )
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run a browser during the block."""
    paths = find_browser()
    assert paths is not None
    driver, browser = paths
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = next(
                found[1]
                for line in process.stdout
                if (found := re.search(r"successfully on port (\d+)", line))
            )
            options = {
                "binary": browser,
                "args": [
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--disable-quic",
                    "--no-first-run",
                    "--disable-background-networking",
                    "--disable-component-update",
                    "--disable-sync",
                    "--window-size=1280,800",
                ],
            }
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", timeout=_TIMEOUT_SECONDS
            ) as http:
                answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
                assert answer.status_code == 200, answer.text
                session = answer.json()["value"]["sessionId"]
                try:
                    yield Browser(http, session)
                finally:
                    http.delete(f"/session/{session}")
        finally:
            process.terminate()
