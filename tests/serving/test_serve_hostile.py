"""`layerstream serve`: malformed requests over raw sockets, and connections that never end."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.loop import run, turns
from support.server import Server
from support.service import CHAT, COMPLETIONS, KEY, MAX_BODY, TEXT_BODY, send_request

pytest.importorskip("fastapi", reason="needs layerstream[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs layerstream[serve]")

from starlette.requests import Request  # noqa: E402 - it comes with fastapi
from starlette.responses import PlainTextResponse  # noqa: E402
from uvicorn.server import ServerState  # noqa: E402

from layerstream.tools.serving import connections, request_body  # noqa: E402
from layerstream.tools.serving.errors import ApiError  # noqa: E402
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402

CLOSING = (
    f"Host: localhost\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
    "Content-Type: application/json\r\n"
)


def post(body: bytes, headers: str = "", path: str = COMPLETIONS) -> bytes:
    """A request with ``headers``, by default the length of its body."""
    headers = headers or f"Content-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\n{CLOSING}{headers}\r\n\r\n".encode() + body


def head(method: str, path: str, more: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\n{CLOSING}{more}\r\n".encode()


def exchange(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send ``request``; returns status, headers and content of the response."""
    host, port = server.url.removeprefix("http://").split(":")
    received = bytearray()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        # If the server closes the connection meanwhile, what was received until then counts.
        with contextlib.suppress(OSError):
            connection.sendall(request)
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                received += piece
    first, _, content = bytes(received).partition(b"\r\n\r\n")
    line, *lines = first.decode().split("\r\n")
    headers = dict(each.lower().split(": ", 1) for each in lines)
    return int(line.split()[1]), headers, content


CHUNKED = "Transfer-Encoding: chunked"
NOT_HTTP = {
    "noise": (b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "a raw path": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a giant header": (head("GET", "/health", f"X: {'a' * 200_000}\r\n"), 431),
    "a giant path": (head("GET", f"/{'a' * 200_000}"), 431),
    "a negative length": (post(b"{}", "Content-Length: -1"), 400),
    "a length in words": (post(b"{}", "Content-Length: two"), 400),
    "two lengths": (post(b"{}", "Content-Length: 2\r\nContent-Length: 3"), 400),
    "a chunk of no size": (post(b"zz\r\nabc\r\n", CHUNKED), 400),
    "a later chunk of no size": (post(b"2\r\n{}\r\nzz\r\n", CHUNKED), 400),
    "an endless name of a chunk": (post(b"2;" + b"a" * 100_000, CHUNKED), 431),
    "another encoding": (post(b"{}", "Transfer-Encoding: gzip"), 501),
}
WRONG = {
    "a length beyond all limits": (post(b"{}", "Content-Length: 99999999999999999999"), 413),
    "a body far too long": (post(b"x" * (100 * MAX_BODY)), 413),
    "a body of chunks far too long": (
        post((b"2000\r\n" + b"x" * 8192 + b"\r\n") * 1000, CHUNKED),
        413,
    ),
    "a length that is too short": (post(json.dumps(TEXT_BODY).encode(), "Content-Length: 10"), 400),
    "a compressed body": (
        post(b"\x1f\x8b\x08\x00", "Content-Encoding: gzip\r\nContent-Length: 4"),
        400,
    ),
    "UTF-16": (post(json.dumps(TEXT_BODY).encode("utf-16")), 400),
    "a raw half of a character": (post(b'{"model": "\xed\xa0\x80"}'), 400),
    "half a character for a name": (post(b'{"model": "tiny", "prompt": "a", "\\udfff": 1}'), 400),
    "lists in lists": (post(b"[" * 1000 + b"]" * 1000), 400),
    "many short lists": (post(b'{"prompt": [' + b",".join([b"[]"] * 20_000) + b"]}"), 400),
    "a path that is no text": (head("GET", "/v1/models/%ff%ed%a0%80%00"), 404),
    "a path with a line's end": (head("GET", "/%0d%0aX:%20y"), 404),
    "a path with a slash too many": (head("GET", "/health/"), 404),
    "a method of no use": (head("TRACE", "/health"), 405),
    "a name of a megabyte": (post(json.dumps({**TEXT_BODY, "model": "a" * 90_000}).encode()), 404),
}


@pytest.mark.parametrize("case", [*NOT_HTTP, *WRONG])
def test_malformed_requests_get_openais_error_and_the_service_continues(
    case: str, server: Server
) -> None:
    request, status = (NOT_HTTP | WRONG)[case]
    got, headers, content = exchange(server, request)
    assert got == status
    assert headers["content-type"] == "application/json"
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"] == "invalid_http") == (case in NOT_HTTP)
    assert 10 < len(error["message"]) < 1100
    assert exchange(server, post(json.dumps(TEXT_BODY).encode()))[0] == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_read_only_paths_support_head_and_options(path: str, server: Server) -> None:
    status, headers, content = exchange(server, head("HEAD", path))
    assert (status, content) == (200, b"")
    assert int(headers["content-length"]) > 0
    status, headers, content = exchange(server, head("OPTIONS", path))
    assert (status, content) == (204, b"")
    assert set(headers["allow"].split(", ")) == {"get", "head", "options"}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_post_paths_support_options_without_cors_headers(path: str, server: Server) -> None:
    status, headers, _ = exchange(server, head("OPTIONS", path, "Origin: http://elsewhere\r\n"))
    assert (status, headers["allow"]) == (204, "post, options")
    assert "access-control-allow-origin" not in headers


def test_a_connection_reset_at_any_time_causes_no_traceback(server: Server) -> None:
    for missing in (0, 1):
        with send_request(server, {**TEXT_BODY, "stream": True}, missing=missing) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert exchange(server, post(json.dumps(TEXT_BODY).encode()))[0] == 200
    assert "Traceback" not in server.log  # nor later: see ``running_server``


# -- connections that never end ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def hello_connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to an app that answers every request with "hello"; yields the client's streams."""
    config = uvicorn.Config(PlainTextResponse("hello"), log_config=None, lifespan="off", ws="none")
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: connections.Connection(
            most=1, config=config, server_state=ServerState(), app_state={}
        ),
        "127.0.0.1",
        0,
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("first_request", "partial"), [(b"", b""), (b"", b"GET / HT"), (WHOLE, b"GET / HT")]
)
def test_a_connection_with_an_incomplete_header_is_closed(
    first_request: bytes, partial: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A complete first request has all the time it needs.
    monkeypatch.setattr(connections, "_WAIT_SECONDS", 3600 if first_request else 0.05)

    async def main() -> None:
        async with hello_connection() as (reader, writer):
            if first_request:
                writer.write(first_request)
                await reader.readuntil(b"hello")
                monkeypatch.setattr(connections, "_WAIT_SECONDS", 0.05)
            writer.write(partial)
            assert await reader.read() == b""  # the server closes it

    run(main())


async def send_endless_chunks(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"1\r\na\r\n")
        await writer.drain()
        await turns(1)


def test_an_endless_body_of_an_answered_request_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with hello_connection() as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await reader.readuntil(b"hello")
            monkeypatch.setattr(connections, "_WAIT_SECONDS", 0.05)
            with pytest.raises(ConnectionError):
                await send_endless_chunks(writer)

    run(main())


class Endless:
    """A client that sends ``pieces``, but never the end of its body."""

    def __init__(self, *pieces: bytes) -> None:
        self._messages = [{"type": "http.request", "body": x, "more_body": True} for x in pieces]

    async def __call__(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)


async def read(receive: Any, kind: Any = CompletionRequest) -> Any:
    """Parse what a client sends with ``read_request``."""

    async def in_thread(function: Any, *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    request, _ = await request_body.read_request(
        Request(scope, receive),
        kind,
        max_bytes=1 << 20,
        stopping=asyncio.Event(),
        in_thread=in_thread,
    )
    return request


def test_an_incomplete_body_gets_a_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_body, "_BODY_SECONDS", 0.05)
    with pytest.raises(ApiError) as caught:
        run(read(Endless(b'{"model":', b' "tiny"')))
    assert caught.value.status == 408


LARGE = {
    "empty lists": b'{"prompt": [' + b",".join([b"[]"] * 340_000) + b"]}",
    "pairs of lists": b'{"prompt": [' + b",".join([b"[[]]"] * 200_000) + b"]}",
    "names": b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}",
    "messages": b'{"messages": [' + b",".join([b'{"role": "user"}'] * 50_000) + b"]}",
}


@pytest.mark.parametrize("case", LARGE)
def test_a_body_with_very_many_nodes_is_refused_before_it_is_parsed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "from_json", None)  # a call would fail
    kind = ChatRequest if case == "messages" else CompletionRequest
    with pytest.raises(ApiError, match="16384 lists, objects and names"):
        run(read(whole(LARGE[case]), kind))


def whole(body: bytes) -> Any:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def test_brackets_and_colons_in_a_string_are_not_counted_as_nodes() -> None:
    for text in ('[{"a": 1}]\\' * 20_000, '\\"[' * 20_000, ":" * 100_000):
        body = json.dumps({"model": "tiny", "prompt": text}).encode()
        assert run(read(whole(body))).prompt == text


@pytest.mark.parametrize("name", ["prompt", "messages", "content"])
def test_lists_have_a_limit_that_the_error_names(name: str) -> None:
    items: dict[str, Any] = {
        "prompt": ["a"] * 2049,
        "messages": [{"role": "user", "content": "a"}] * 2049,
        "content": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 129}],
    }
    body = {"model": "tiny", ("prompt" if name == "prompt" else "messages"): items[name]}
    kind = CompletionRequest if name == "prompt" else ChatRequest
    with pytest.raises(ApiError, match="up to 128 parts" if name == "content" else "up to 2048"):
        run(read(whole(json.dumps(body).encode()), kind))
