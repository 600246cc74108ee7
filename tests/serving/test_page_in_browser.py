"""The service's page in Chromium: where Debian's chromium and chromium-driver are installed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.service import HOST, KEY, gauge

from layerstream.tools.cli import main

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from support.browser import Browser, find_axe, find_browser, running_browser  # noqa: E402 - it needs httpx2

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium and chromedriver: apt install chromium-driver"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with running_browser() as chromium:
        yield chromium


@pytest.fixture
def page(chromium: Browser, server: Any) -> Iterator[Browser]:
    """The page, opened by somebody with the key; it must have no errors, and ask nobody else."""
    chromium.open(server.url)
    if not chromium.run("return sessionStorage.getItem('layerstream-key')"):
        chromium.wait(
            lambda: chromium.run("return document.querySelector('dialog[open]') !== null")
        )
        chromium.type("#key", KEY)
        chromium.click("#key-form button")
    chromium.wait(lambda: "Tokens per sweep" in chromium.text("#figures"))
    chromium.console()  # those 401 that led to the dialog
    yield chromium
    assert chromium.console() == []
    hosts = chromium.requested() - {"newtab", ""}
    assert hosts <= {server.url.removeprefix("http://")}


@pytest.fixture(scope="module")
def plan_page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `plan --html` writes."""
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    assert main(["plan", str(folder), "--device", "cpu", "--host", HOST, "--html", str(path)]) == 0
    return path


def answered(page: Browser, number: int) -> Any:
    script = "return document.querySelectorAll('article.assistant .note').length"
    return page.wait(lambda: page.run(script) >= number)


def test_an_answer_streams_and_the_figures_are_those_of_the_metrics(
    page: Browser, http: Any
) -> None:
    assert re.search(r"read again for each token, which takes about \d", page.text("#welcome"))
    page.run("document.getElementById('limit').value = 12")
    page.run("document.getElementById('temperature').value = 0")
    page.type("#text", "Hello\n")
    answered(page, 1)
    assert page.text("article.user .said") == "Hello"
    assert page.text("article.assistant .said")
    assert "12 tokens, the first after" in page.text("article .note")
    assert page.text("#status") == "The answer is complete."
    assert page.run("return document.getElementById('welcome').hidden")
    tokens = int(gauge(http, "layerstream_generated_tokens_total"))
    sweeps = int(gauge(http, "layerstream_sweeps_total"))
    page.wait(lambda: f"{tokens} in {sweeps} sweeps" in page.text("#figures"))
    machine = http.get("/v1/machine").json()
    assert page.run("return document.querySelectorAll('#map i').length") == len(machine["layers"])


@pytest.mark.parametrize("stop", ["the button", "Escape"])
def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    page: Browser, http: Any, stop: str
) -> None:
    text = "return document.querySelector('article.assistant:last-child .said').textContent.length"
    page.run("document.getElementById('temperature').value = 0")  # which does not end soon
    page.type("#text", "Hello\n")
    page.wait(lambda: page.text("article.assistant") and page.run(text) > 10)
    if stop == "Escape":
        page.type("#text", "\ue00c")
    else:
        page.click("#stop")
    page.wait(lambda: page.text("#status") == "Stopped.")
    assert page.run("return document.getElementById('send').disabled") is False
    page.wait(lambda: gauge(http, "layerstream_open_answers") == 0)


def test_a_new_chat_in_mid_answer_has_nothing_of_the_old_one(page: Browser) -> None:
    page.run(
        "window.sent = []; const fetch = window.fetch;"
        "window.fetch = (path, options) => { if (options?.body) window.sent.push(options.body); return fetch(path, options); };"
        "document.getElementById('temperature').value = 0"
    )
    page.type("#text", "Old\n")
    page.wait(lambda: page.text("article.assistant .said"))
    page.click("#reset")
    page.wait(lambda: page.text("#status") == "Stopped.")
    page.run("document.getElementById('limit').value = 2")
    page.type("#text", "New\n")
    answered(page, 1)
    old, new = (json.loads(body)["messages"] for body in page.run("return window.sent"))
    assert (old, new) == (
        [{"role": "user", "content": "Old"}],
        [{"role": "user", "content": "New"}],
    )
    assert page.text("article.user .said") == "New"


def test_the_keyboard_alone_sends_stops_and_sends_again(page: Browser) -> None:
    focused = "return document.activeElement.id"
    tab, space = "\ue004", " "
    page.run("document.getElementById('temperature').value = 0")
    page.type("#text", f"Hello{tab}")
    assert page.run(focused) == "send"
    page.type("#send", space)
    page.wait(lambda: page.text("article.assistant .said"))
    assert page.run(focused) == "stop"
    page.type("#stop", space)
    page.wait(lambda: page.text("#status") == "Stopped.")
    assert page.run(focused) == "text"
    page.run("document.getElementById('limit').value = 2")
    page.type("#text", "Again\n")
    answered(page, 2)


def test_an_error_is_shown_in_the_services_own_words(page: Browser) -> None:
    page.run("document.getElementById('limit').value = 99999999")
    page.type("#text", "Hello\n")
    page.wait(lambda: "maximum context length" in page.text("article .failed"))
    assert page.run("return document.getElementById('text').value") == "Hello"  # to be sent again
    assert all("400" in line for line in page.console())  # the browser's own line about the status


ANSWER = """# A title

Some *words* of **great** importance, `code`, snake_case_names, 2 * 3 * 4 and <b>no markup</b>.
A second line, and [a link](https://example.org/ "stays").

1. first
   - inner
2. second

   ```python
   print("a" * 3, "<script>", "{long}")
   ```

| name | value |
|------|------:|
| a    | **1** |

> quoted

```
not closed ye""".replace("{long}", "x" * 400)


def rendered(page: Browser, text: str) -> str:
    """Show ``text`` as an answer; returns the elements that it became."""
    script = """
    return import("/page/markdown.js").then(({ Markdown }) => {
      const article = document.createElement("article"), element = document.createElement("div");
      article.className = "assistant";
      element.className = "said";
      document.getElementById("log").replaceChildren(article);
      article.append(element);
      const shown = new Markdown(element);
      if (arguments[1]) for (let end = 1; end < arguments[0].length; end++) shown.show(arguments[0].slice(0, end));
      shown.show(arguments[0]);
      return element.innerHTML.replaceAll(/ (tabindex|role|aria-label|class|type)="[^"]*"/g, "");
    });"""
    whole = page.run(script, text, False)
    assert page.run(script, text, True) == whole, "it depends on how it came"
    return str(whole)


def test_markdown_of_an_answer_is_shown_and_nothing_of_it_is_markup(page: Browser) -> None:
    html = rendered(page, ANSWER)
    assert html == (
        "<h3>A title</h3><p>Some <em>words</em> of <strong>great</strong> importance, <code>code</code>, "
        "snake_case_names, 2 * 3 * 4 and &lt;b&gt;no markup&lt;/b&gt;.\n"
        'A second line, and [a link](https://example.org/ "stays").</p>'
        '<ol start="1"><li><p>first</p><ul><li><p>inner</p></li></ul></li><li><p>second</p>'
        "<div><div><span>python</span><button>Copy</button></div>"
        f'<pre><code>print("a" * 3, "&lt;script&gt;", "{"x" * 400}")</code></pre></div></li></ol>'
        "<div><table><thead><tr><th>name</th><th>value</th></tr></thead>"
        "<tbody><tr><td>a</td><td><strong>1</strong></td></tr></tbody></table></div>"
        "<blockquote><p>quoted</p></blockquote>"
        "<div><div><span>code</span><button>Copy</button></div><pre><code>not closed ye</code></pre></div>"
    )


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("- a\n- b\n\n- c", "<ul><li><p>a</p></li><li><p>b</p></li><li><p>c</p></li></ul>"),
        ("a\n- b\nc", "<p>a</p><ul><li><p>b\nc</p></li></ul>"),
        ("3) a\n* b", '<ol start="3"><li><p>a</p></li></ol><ul><li><p>b</p></li></ul>'),
        ("*a **b** c* `` `d ``", "<p><em>a <strong>b</strong> c</em> <code>`d</code></p>"),
        ("**open `tick", "<p>**open `tick</p>"),
        (r"\*a\* \(x\)", r"<p>*a* \(x\)</p>"),
        ("a | b\nno table", "<p>a | b\nno table</p>"),
        ("***\na\n---", "<hr><p>a</p><hr>"),
        ("-", "<ul><li></li></ul>"),
    ],
)
def test_what_models_write_besides(page: Browser, text: str, html: str) -> None:
    assert rendered(page, text) == html


def test_a_hostile_answer_ends_in_time(page: Browser) -> None:
    show = "return import('/page/markdown.js').then(({ Markdown }) => { new Markdown(document.createElement('div')).show(arguments[0]); })"
    for text in (
        ">" * 20_000,
        "- " * 20_000,
        "*a " * 20_000,
        "`" * 20_001,
        "|-" * 20_000,
        "* a\n " * 5000,
    ):
        page.run(show, text)  # or the driver's timeout


def test_all_fields_have_labels_and_pictures_words(page: Browser) -> None:
    unnamed = (
        "return [...document.querySelectorAll('input, textarea, button, [role=img]')].filter(e => "
        "!e.hidden && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert page.run(unnamed) == []
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert page.run(twice) == 0


def too_wide(page: Browser) -> Any:
    """Elements that reach beyond the right edge of the screen, but for what is scrolled inside of them."""
    return page.run(
        "const all = [...document.body.querySelectorAll('*')].filter(e => !e.closest('.skip, pre, .wide'));"
        "return all.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id + e.tagName)"
    )


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Browser) -> None:
    with page.screen(360, 740):
        assert page.run("return innerWidth") == 360
        assert too_wide(page) == []
        rendered(page, ANSWER)
        assert too_wide(page) == []


def test_in_the_dark_the_page_is_dark(page: Browser) -> None:
    color = "return getComputedStyle(document.body).backgroundColor"
    with page.screen(dark=True):
        dark = page.run(color)
    assert dark != page.run(color)


@pytest.mark.skipif(find_axe() is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_audit_finds_nothing_serious_before_during_and_after_an_answer(
    page: Browser, width: int, *, dark: bool
) -> None:
    with page.screen(width, dark=dark):
        assert page.audit() == []
        page.run("document.querySelector('details').open = true")
        page.run("document.getElementById('temperature').value = 0")  # which does not end soon
        page.type("#text", "Hello\n")
        page.wait(lambda: page.text("article.assistant .said"))
        assert page.audit() == []
        page.click("#stop")  # if it has not ended meanwhile
        answered(page, 1)
        assert page.audit() == []


@pytest.mark.skipif(find_axe() is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_audit_of_a_plans_page_finds_nothing_serious(
    chromium: Browser, plan_page: Path, width: int, *, dark: bool
) -> None:
    chromium.open(plan_page.as_uri())
    with chromium.screen(width, dark=dark):
        assert chromium.audit() == []
        assert too_wide(chromium) == []
    assert chromium.console() == []
