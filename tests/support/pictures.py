"""Takes the pictures of README.md from a model that is really served: see the README's section on development.

Usage: PYTHONPATH=tests python -m support.pictures MODEL QUESTION QUESTION [OPTION ...], with options of
`layerstream serve`, each with a value.
"""

import io
import sys
import tempfile
from pathlib import Path

from layerstream.tools.cli import main
from support.browser import Browser, running_browser
from support.server import running_server

FOLDER = Path(__file__).parent.parent.parent / "tools" / "serving" / "pictures"
_TOKENS = 16  # of the first answer
_CHARACTERS = 60  # of the second one when the pictures are taken
_COLORS = 128  # which no eye misses, at a third of the size


def take(model: str, questions: list[str], options: list[str]) -> None:
    """Ask the served model ``questions``, and take the pictures while it answers the second one."""
    FOLDER.mkdir(exist_ok=True)
    with running_browser() as browser, running_server(Path(model), *options) as server:
        with browser.screen(1280, 800, scale=1.5):
            _ask(browser, server.url, *questions)
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


def _ask(browser: Browser, url: str, first: str, second: str) -> None:
    browser.open(url)
    browser.run(
        "document.getElementById('temperature').value = 0;"
        f"document.getElementById('limit').value = {_TOKENS}"
    )
    browser.type("#text", f"{first}\n")
    browser.wait(lambda: browser.text("article.assistant .note"))
    browser.run("document.getElementById('limit').value = ''")
    browser.type("#text", f"{second}\n")
    browser.wait(lambda: len(browser.text("article:last-child .said")) > _CHARACTERS)


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
    take(sys.argv[1], sys.argv[2:4], sys.argv[4:])
