"""`layerstream serve`: what monitors see of it."""

from pathlib import Path
from typing import Any

import pytest
from support.server import running_server, wait_until
from support.service import (
    CHAT,
    CHAT_BODY,
    COMPLETIONS,
    HOST,
    MEMORY,
    TEXT_BODY,
    gauge,
    idle,
)

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


def test_each_response_has_the_clients_id_or_a_new_one(http: Any, client: Any) -> None:
    answer = http.post(COMPLETIONS, json=TEXT_BODY, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    for path, headers in (("/health", {}), ("/nowhere", {}), ("/health", {"X-Request-Id": "a b"})):
        assert len(http.get(path, headers=headers).headers["x-request-id"]) == 32
    done = client.chat.completions.with_raw_response.create(**CHAT_BODY)
    assert len(done.request_id or done.headers["x-request-id"]) == 32


def test_times_and_refusals_are_counted(http: Any) -> None:
    wait_until(lambda: idle(http))
    names = ("queue_seconds_count", "first_token_seconds_count", "token_seconds_count")
    before = [gauge(http, f"layerstream_{name}") for name in names]
    body = TEXT_BODY | {"max_tokens": 5, "n": 2, "ignore_eos": True}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    after = [gauge(http, f"layerstream_{name}") for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 2, 8]
    http.post(CHAT, json={})
    http.get("/nowhere/at/all")
    text = http.get("/metrics").text
    assert 'layerstream_responses_total{path="/v1/chat/completions",status="400"}' in text
    assert 'layerstream_responses_total{path="other",status="404"}' in text
    assert "nowhere" not in text


def test_health_tells_when_nothing_moves_until_it_does_again(folder: Path) -> None:
    # A layer batch takes minutes.
    slow = ("--host", HOST, *MEMORY, "--throttle", "4KiB", "--stall-seconds", "0.2")
    with (
        running_server(folder, *slow, "--served-model-name", "tiny") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        assert http.get("/health").json() == {"status": "ok"}
        with http.stream("POST", COMPLETIONS, json=TEXT_BODY | {"stream": True}):
            wait_until(lambda: http.get("/health").status_code == 503)
            answer = http.get("/health").json()
            assert answer["status"] == "stalled"
            assert "nothing has moved" in answer["message"]
            assert gauge(http, "layerstream_still_seconds") > 0.2
        # Its client has left: there is nothing that should move.
        wait_until(lambda: http.get("/health").status_code == 200)
        server.process.kill()
        server.wait()
