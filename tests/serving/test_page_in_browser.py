"""The service's page in Chromium: where Debian's chromium and chromium-driver are installed."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.service import KEY, gauge

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from support.browser import Browser, find_browser, running_browser  # noqa: E402 - it needs httpx2

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


def answered(page: Browser, number: int) -> Any:
    script = "return document.querySelectorAll('article.assistant .note').length"
    return page.wait(lambda: page.run(script) >= number)


def test_an_answer_streams_and_the_figures_are_those_of_the_metrics(
    page: Browser, http: Any
) -> None:
    page.run("document.getElementById('limit').value = 12")
    page.run("document.getElementById('temperature').value = 0")
    page.type("#text", "Hello\n")
    answered(page, 1)
    assert page.text("article.user p") == "Hello"
    assert page.text("article.assistant > p:not(.note)")
    assert "12 tokens, the first after" in page.text("article .note")
    assert page.text("#status") == "The answer is complete."
    tokens = int(gauge(http, "layerstream_generated_tokens_total"))
    sweeps = int(gauge(http, "layerstream_sweeps_total"))
    page.wait(lambda: f"{tokens} in {sweeps} sweeps" in page.text("#figures"))
    machine = http.get("/v1/machine").json()
    assert page.run("return document.querySelectorAll('#map i').length") == len(machine["layers"])


@pytest.mark.parametrize("stop", ["the button", "Escape"])
def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    page: Browser, http: Any, stop: str
) -> None:
    text = "return document.querySelector('article.assistant:last-child p').textContent.length"
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


def test_an_error_is_shown_in_the_services_own_words(page: Browser) -> None:
    page.run("document.getElementById('limit').value = 99999999")
    page.type("#text", "Hello\n")
    page.wait(lambda: "maximum context length" in page.text("article .failed"))
    assert all("400" in line for line in page.console())  # the browser's own line about the status


def test_all_fields_have_labels_and_pictures_words(page: Browser) -> None:
    unnamed = (
        "return [...document.querySelectorAll('input, textarea, button, [role=img]')].filter(e => "
        "!e.hidden && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert page.run(unnamed) == []
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert page.run(twice) == 0


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Browser) -> None:
    try:
        page.resize(500, 800)  # the narrowest window of Chromium; a phone is narrower
        page.run("document.body.style.width = '360px'")
        wide = "return [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 361).map(e => e.id + e.tagName)"
        assert page.run(wide) == []
    finally:
        page.resize(1280, 800)


def test_in_the_dark_the_page_is_dark(page: Browser) -> None:
    color = "return getComputedStyle(document.body).backgroundColor"
    try:
        page.dark(dark=True)
        dark = page.run(color)
    finally:
        page.dark(dark=False)
    assert dark != page.run(color)
