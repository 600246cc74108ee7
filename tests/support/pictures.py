"""Takes the pictures of README.md from a model that is really served: see the README's section on development.

Usage: PYTHONPATH=tests python -m support.pictures MODEL QUESTION [OPTION ...], with options of `layerstream serve`.
"""

import io
import sys
import tempfile
from pathlib import Path

from layerstream.tools.cli import main
from support.browser import Browser, running_browser
from support.server import running_server

FOLDER = Path(__file__).parent.parent.parent / "tools" / "serving" / "pictures"
_TOKENS = 60
_COLORS = 128  # which no eye misses, at a third of the size


def take(model: str, question: str, options: list[str]) -> None:
    """Ask the served model ``question``, and take the pictures while it answers."""
    FOLDER.mkdir(exist_ok=True)
    with running_browser() as browser, running_server(Path(model), *options) as server:
        with browser.screen(1280, 800, scale=1.5):
            _ask(browser, server.url, question)
            _save(browser, "page.png")
        with browser.screen(390, 844, dark=True, scale=1.5):
            _save(browser, "phone.png")
            browser.run("document.querySelector('aside').scrollIntoView()")
            _save(browser, "phone-machine.png")
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "plan.html"
            main(["plan", model, "--html", str(page), *_planned(options)])
            browser.open(page.as_uri())
            with browser.screen(1000, 1000):
                _save(browser, "plan.png")


def _ask(browser: Browser, url: str, question: str) -> None:
    browser.open(url)
    browser.run(
        "document.getElementById('temperature').value = 0;"
        f"document.getElementById('limit').value = {_TOKENS}"
    )
    browser.type("#text", f"{question}\n")
    browser.wait(lambda: browser.text("article.assistant .note"))
    browser.type("#text", "And at sunset?\n")
    # The last seconds' timeline shows this answer alone once a third of it is there.
    browser.wait(lambda: len(browser.text("article:last-child .said")) > 100)


def _planned(options: list[str]) -> list[str]:
    """Those of the options that `layerstream plan` has, too."""
    pairs = zip(options[::2], options[1::2], strict=True)
    shared = {"--host", "--vram", "--device", "--reader", "--prompt-tokens", "--new-tokens"}
    return [each for name, value in pairs if name in shared for each in (name, value)]


def _save(browser: Browser, name: str) -> None:
    from PIL import Image

    path = FOLDER / name
    browser.picture(path)
    picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    picture.quantize(_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    take(sys.argv[1], sys.argv[2], sys.argv[3:])
