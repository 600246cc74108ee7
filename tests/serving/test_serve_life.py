"""`layerstream serve`: clients that come and go, and how the service begins and ends."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.server import Server, save_speaking_model, serving, until
from support.service import (
    ASK,
    CHAT,
    COMPLETIONS,
    GREEDY,
    HOST,
    LONG,
    MEMORY,
    SAY,
    TALK,
    Reference,
    gauge,
    left,
    quiet,
)

from layerstream.tools.cli import main

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


def test_more_than_there_are_places_for_are_told_to_come_back(
    http: Any, client: Any, server: Server
) -> None:
    with ExitStack() as stack:
        for count in (8, 4):  # answers to one request take as many places
            stack.enter_context(left(server, LONG | {"n": count}))
        until(lambda: gauge(http, "layerstream_open_answers") == 12)
        answer = http.post(COMPLETIONS, json=ASK)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**ASK)
    until(lambda: quiet(http))
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_served_no_longer(stream: bool, http: Any, server: Server) -> None:
    until(lambda: quiet(http))
    before = gauge(http, "layerstream_requests_cancelled_total")
    with left(server, LONG | {"stream": stream}) as connection:
        until(lambda: gauge(http, "layerstream_requests_riding") == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    until(lambda: quiet(http))
    assert gauge(http, "layerstream_requests_cancelled_total") == before + 1
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


def test_a_client_that_does_not_read_holds_nobody_up(
    server: Server, http: Any, client: Any, reference: Reference
) -> None:
    with left(server, LONG | {"stream": True}):
        done = client.completions.create(prompt="Hello", max_tokens=24, **GREEDY)
        assert done.choices[0].text == reference.text("Hello", 24)
    until(lambda: quiet(http))


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return save_speaking_model(tmp_path_factory.mktemp("serve") / "mute", template=False)


def test_a_signal_lets_streams_end_with_an_error_and_the_server_with_0(mute: Path) -> None:
    options = ("--shutdown-seconds", "0", "--no-access-log", "--new-tokens", "2000")
    with (
        serving(mute, *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        error = http.post(CHAT, json=TALK | {"model": "mute"}).json()["error"]
        assert "chat template" in error["message"]
        asked = LONG | {"model": "mute", "stream": True, "max_tokens": 2000}
        with http.stream("POST", COMPLETIONS, json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            said = [line for line in lines if line]
        assert json.loads(said[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.wait() == 0
        assert "POST" not in server.log


def test_streaming_that_fails_for_good_is_told_to_clients_and_to_whoever_watches(
    mute: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    options = ("--chat-template", str(template), "--host", HOST, "--reader", "direct", *MEMORY)
    with (
        serving(mute, *options, "--new-tokens", "8") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        answer = http.post(CHAT, json={"model": "mute", "messages": SAY, "temperature": 0})
        assert answer.json()["usage"]["completion_tokens"] == 8  # the server's own limit
        ask = ASK | {"model": "mute"}
        with (mute / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        until(lambda: http.post(COMPLETIONS, json=ask).status_code != 200)
        answer = http.post(COMPLETIONS, json=ask | {"stream": True})
        assert answer.status_code in {500, 503}
        assert answer.json()["error"]["type"] == "server_error"
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")


REFUSED = {
    "a missing folder": ("nowhere", (), "nowhere"),
    "no tokenizer": ("mute", (), "no tokenizer"),
    "an address that is not ours": ("model", ("--bind", "192.0.2.1"), "Cannot listen on 192.0.2.1"),
    "an empty key": ("model", ("--api-key", ""), "API key is empty"),
    "a key with blanks": ("model", ("--api-key", "a b"), "API key"),
    "no such template": ("model", ("--chat-template", "nowhere"), "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_told_in_one_line(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, says = REFUSED[case]
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert main(["serve", str(tmp_path / name), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("layerstream: error: ")
    assert says in error
    assert error.count("\n") == 1
