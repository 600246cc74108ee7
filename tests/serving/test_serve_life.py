"""`layerstream serve`: clients that connect and leave, and how the service starts and ends."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.server import Server, running_server, save_chat_model, wait_until
from support.service import (
    CHAT,
    CHAT_BODY,
    COMPLETIONS,
    GREEDY,
    HOST,
    LONG_BODY,
    MEMORY,
    TEXT_BODY,
    Reference,
    gauge,
    idle,
    send_request,
)

from layerstream.tools.cli import main

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


def test_requests_beyond_the_limit_get_a_429_with_retry_after(
    http: Any, client: Any, server: Server
) -> None:
    with ExitStack() as stack:
        for count in (8, 4):  # each answer to a request counts
            stack.enter_context(send_request(server, LONG_BODY | {"n": count}))
        wait_until(lambda: gauge(http, "layerstream_open_answers") == 12)
        answer = http.post(COMPLETIONS, json=TEXT_BODY)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**TEXT_BODY)
    wait_until(lambda: idle(http))
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_the_request_of_a_client_that_leaves_is_cancelled(
    stream: bool, http: Any, server: Server
) -> None:
    wait_until(lambda: idle(http))
    before = gauge(http, "layerstream_requests_cancelled_total")
    with send_request(server, LONG_BODY | {"stream": stream}) as connection:
        wait_until(lambda: gauge(http, "layerstream_requests_riding") == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    wait_until(lambda: idle(http))
    assert gauge(http, "layerstream_requests_cancelled_total") == before + 1
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200


def test_a_client_that_does_not_read_does_not_delay_others(
    server: Server, http: Any, client: Any, reference: Reference
) -> None:
    with send_request(server, LONG_BODY | {"stream": True}):
        done = client.completions.create(prompt="Hello", max_tokens=24, **GREEDY)
        assert done.choices[0].text == reference.text("Hello", 24)
    wait_until(lambda: idle(http))


@pytest.fixture(scope="module")
def no_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return save_chat_model(tmp_path_factory.mktemp("serve") / "no_template", template=False)


def test_a_signal_ends_streams_with_an_error_and_the_server_with_exit_code_0(
    no_template: Path,
) -> None:
    options = ("--shutdown-seconds", "0", "--no-access-log", "--new-tokens", "2000")
    with (
        running_server(no_template, *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        error = http.post(CHAT, json=CHAT_BODY | {"model": "no_template"}).json()["error"]
        assert "chat template" in error["message"]
        body = LONG_BODY | {"model": "no_template", "stream": True, "max_tokens": 2000}
        with http.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            received = [line for line in lines if line]
        assert json.loads(received[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.wait() == 0
        assert "POST" not in server.log


def test_a_second_signal_ends_the_process_at_once(no_template: Path) -> None:
    options = ("--shutdown-seconds", "3600", "--new-tokens", "8000")
    with (
        running_server(no_template, *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        body = LONG_BODY | {"model": "no_template", "stream": True, "max_tokens": 8000}
        with http.stream("POST", COMPLETIONS, json=body) as answer:
            next(answer.iter_lines())
            server.process.terminate()
            wait_until(lambda: "a second signal" in server.log)
            assert server.process.poll() is None
            server.process.terminate()
            assert server.wait() == -signal.SIGTERM


def test_an_answer_that_ends_by_a_stop_string_is_a_completed_request(
    http: Any, reference: Reference
) -> None:
    wait_until(lambda: idle(http))
    names = ("layerstream_requests_completed_total", "layerstream_requests_cancelled_total")
    before = [gauge(http, name) for name in names]
    stop = reference.text("Hello", 24)[5:9]
    answer = http.post(COMPLETIONS, json=LONG_BODY | {"stop": stop})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: idle(http))
    assert [gauge(http, name) for name in names] == [before[0] + 1, before[1]]


def test_a_permanent_failure_is_reported_to_clients_and_by_the_health_check(
    no_template: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    options = ("--chat-template", str(template), "--host", HOST, "--reader", "direct", *MEMORY)
    with (
        running_server(no_template, *options, "--new-tokens", "8") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        answer = http.post(CHAT, json=CHAT_BODY | {"model": "no_template"})
        assert answer.json()["usage"]["completion_tokens"] == 4
        body = TEXT_BODY | {"model": "no_template"}
        with (no_template / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        wait_until(lambda: http.post(COMPLETIONS, json=body).status_code != 200)
        answer = http.post(COMPLETIONS, json=body | {"stream": True})
        assert answer.status_code in {500, 503}
        assert answer.json()["error"]["type"] == "server_error"
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")


REFUSED = {
    "a missing folder": ("nowhere", (), "nowhere"),
    "no tokenizer": ("no_template", (), "no tokenizer"),
    "an address that is not ours": ("model", ("--bind", "192.0.2.1"), "Cannot listen on 192.0.2.1"),
    "an empty key": ("model", ("--api-key", ""), "API key is empty"),
    "a key with blanks": ("model", ("--api-key", "a b"), "API key"),
    "no such template": ("model", ("--chat-template", "nowhere"), "nowhere"),
    "a template with an error": ("model", ("--chat-template", "{folder}/broken"), "in line 2"),
    "a template without an end": ("model", ("--chat-template", "{folder}/endless"), "not compile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_reported_in_one_line(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, message = REFUSED[case]
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "no_template").mkdir()
    (tmp_path / "no_template" / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "broken").write_text("{{ messages }}\n{{ messages | no_such_filter }}")
    (tmp_path / "endless").write_text("{% for message in messages %}")
    options = tuple(option.format(folder=tmp_path) for option in options)
    assert main(["serve", str(tmp_path / name), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("layerstream: error: ")
    assert message in error
    assert error.count("\n") == 1
