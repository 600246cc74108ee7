"""`layerstream serve`: which pages of a browser may use it, by host, origin and type of content."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import Server, running_server
from support.service import CHAT, COMPLETIONS, KEY, TEXT_BODY

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

PAGE = "https://chat.example.org"
OURS = "our-machine.example.org"


@pytest.fixture(scope="module")
def open_server(folder: Path) -> Iterator[Server]:
    """A server for the pages of PAGE, and for clients that address it as OURS."""
    options = ("--allow-origin", PAGE, "--allow-host", OURS, "--served-model-name", "tiny")
    with running_server(folder, *options) as server:
        yield server


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_a_page_may_send_anywhere_is_refused(kind: str | None, http: Any) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = http.post(COMPLETIONS, content=json.dumps(TEXT_BODY), headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_json_with_a_character_set_is_json(http: Any) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = http.post(COMPLETIONS, content=json.dumps(TEXT_BODY), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost", "http://localhost:1"])
def test_pages_of_other_origins_are_refused(origin: str, http: Any) -> None:
    answer = http.post(COMPLETIONS, json=TEXT_BODY, headers={"Origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert f"--allow-origin {origin}" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_the_services_own_origin_is_answered(http: Any, server: Server) -> None:
    assert http.get("/v1/models", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models"])
def test_a_name_that_points_here_by_dns_alone_is_refused(path: str, http: Any) -> None:
    answer = http.get(path, headers={"Host": "rebound.example.org:8000"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    assert "--allow-host rebound.example.org" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:80", "[::1]", "[::1]:80", "a.localhost."]
)
def test_names_of_this_machine_are_allowed(host: str, http: Any) -> None:
    assert http.get("/health", headers={"Host": host}).status_code == 200


def test_pages_of_an_allowed_origin_read_answers_and_errors(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.url, headers={"Origin": PAGE}, timeout=60) as http:
        for body, status in ((TEXT_BODY, 200), (TEXT_BODY | {"stream": True}, 200), ({}, 400)):
            answer = http.post(COMPLETIONS, json=body)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "Origin" in answer.headers["vary"]
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        answer = http.options(CHAT, headers=asked)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        other = {"Origin": "https://elsewhere.example.org"}
        assert http.post(COMPLETIONS, json=TEXT_BODY, headers=other).status_code == 403
        answer = http.options(CHAT, headers=asked | other)
        assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_host_is_answered_beside_the_names_of_this_machine(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.url) as http:
        assert http.get("/health", headers={"Host": OURS.upper()}).status_code == 200
        assert http.get("/health").status_code == 200
        assert http.get("/health", headers={"Host": f"not-{OURS}"}).status_code == 403


def test_the_key_is_asked_for_whatever_the_origin(folder: Path) -> None:
    options = ("--allow-origin", "*", "--api-key", KEY, "--served-model-name", "tiny")
    with (
        running_server(folder, *options) as server,
        httpx.Client(base_url=server.url, headers={"Origin": PAGE}) as http,
    ):
        answer = http.post(COMPLETIONS, json=TEXT_BODY)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == PAGE
