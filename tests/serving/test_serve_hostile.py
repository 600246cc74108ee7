"""`layerstream serve`: raw sockets, and what no honest client would send through them."""

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
from support.service import ASK, CHAT, COMPLETIONS, KEY, MAX_BODY, left

pytest.importorskip("fastapi", reason="needs layerstream[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs layerstream[serve]")

from starlette.requests import Request  # noqa: E402 - it comes with fastapi
from starlette.responses import PlainTextResponse  # noqa: E402
from uvicorn.server import ServerState  # noqa: E402

from layerstream.tools.serving import connections, reading  # noqa: E402
from layerstream.tools.serving.errors import ApiError  # noqa: E402
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402

CLOSING = f"Host: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"


def post(body: bytes, headers: str = "", path: str = COMPLETIONS) -> bytes:
    """A request with these headers, or else with the length of its body."""
    headers = headers or f"Content-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\n{CLOSING}{headers}\r\n\r\n".encode() + body


def head(method: str, path: str, more: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\n{CLOSING}{more}\r\n".encode()


def answered(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of the answer to these bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    said = bytearray()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        # Who is hung up on while he talks, or before he has listened, has what came until then.
        with contextlib.suppress(OSError):
            connection.sendall(request)
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                said += piece
    first, _, content = bytes(said).partition(b"\r\n\r\n")
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
    "a length that is too short": (post(json.dumps(ASK).encode(), "Content-Length: 10"), 400),
    "a compressed body": (
        post(b"\x1f\x8b\x08\x00", "Content-Encoding: gzip\r\nContent-Length: 4"),
        400,
    ),
    "UTF-16": (post(json.dumps(ASK).encode("utf-16")), 400),
    "a raw half of a character": (post(b'{"model": "\xed\xa0\x80"}'), 400),
    "half a character for a name": (post(b'{"model": "tiny", "prompt": "a", "\\udfff": 1}'), 400),
    "lists in lists": (post(b"[" * 1000 + b"]" * 1000), 400),
    "many short lists": (post(b'{"prompt": [' + b",".join([b"[]"] * 20_000) + b"]}"), 400),
    "a path that is no text": (head("GET", "/v1/models/%ff%ed%a0%80%00"), 404),
    "a path with a line's end": (head("GET", "/%0d%0aX:%20y"), 404),
    "a path with a slash too many": (head("GET", "/health/"), 404),
    "a method of no use": (head("TRACE", "/health"), 405),
    "a name of a megabyte": (post(json.dumps({**ASK, "model": "a" * 90_000}).encode()), 404),
}


@pytest.mark.parametrize("case", [*NOT_HTTP, *WRONG])
def test_nonsense_gets_openais_error_and_the_service_goes_on(case: str, server: Server) -> None:
    request, status = (NOT_HTTP | WRONG)[case]
    got, headers, content = answered(server, request)
    assert got == status
    assert headers["content-type"] == "application/json"
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"] == "invalid_http") == (case in NOT_HTTP)
    assert 10 < len(error["message"]) < 1100
    assert answered(server, post(json.dumps(ASK).encode()))[0] == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_what_is_read_has_a_head_and_says_what_may_be_done_with_it(
    path: str, server: Server
) -> None:
    status, headers, content = answered(server, head("HEAD", path))
    assert (status, content) == (200, b"")
    assert int(headers["content-length"]) > 0
    status, headers, content = answered(server, head("OPTIONS", path))
    assert (status, content) == (204, b"")
    assert set(headers["allow"].split(", ")) == {"get", "head", "options"}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_asked_says_so_and_lets_no_page_of_another_origin_in(
    path: str, server: Server
) -> None:
    status, headers, _ = answered(server, head("OPTIONS", path, "Origin: http://elsewhere\r\n"))
    assert (status, headers["allow"]) == (204, "post, options")
    assert "access-control-allow-origin" not in headers


def test_a_connection_that_is_reset_at_any_time_is_no_error_of_the_server(server: Server) -> None:
    for missing in (0, 1):
        with left(server, {**ASK, "stream": True}, missing=missing) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert answered(server, post(json.dumps(ASK).encode()))[0] == 200
    assert "Traceback" not in server.log  # nor later: see ``serving``


# -- who never comes to an end -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's end of a connection to an app that says hello, whatever it is asked."""
    config = uvicorn.Config(PlainTextResponse("hello"), log_config=None, lifespan="off", ws="none")
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: connections.Connection(config=config, server_state=ServerState(), app_state={}),
        "127.0.0.1",
        0,
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("answered", "said"), [(b"", b""), (b"", b"GET / HT"), (WHOLE, b"GET / HT")]
)
def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(
    answered: bytes, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What comes to its end has all the time it needs.
    monkeypatch.setattr(connections, "_WAIT_SECONDS", 3600 if answered else 0.05)

    async def main() -> None:
        async with answering() as (reader, writer):
            if answered:
                writer.write(answered)
                await reader.readuntil(b"hello")
                monkeypatch.setattr(connections, "_WAIT_SECONDS", 0.05)
            writer.write(said)
            assert await reader.read() == b""  # it is hung up on

    run(main())


async def send_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"1\r\na\r\n")
        await writer.drain()
        await turns(1)


def test_a_body_whose_request_has_had_its_answer_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with answering() as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await reader.readuntil(b"hello")
            monkeypatch.setattr(connections, "_WAIT_SECONDS", 0.05)
            with pytest.raises(ConnectionError):
                await send_for_ever(writer)

    run(main())


class Endless:
    """A client that sends ``pieces``, and then nothing more."""

    def __init__(self, *pieces: bytes) -> None:
        self._messages = [{"type": "http.request", "body": x, "more_body": True} for x in pieces]

    async def __call__(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)


async def read(receive: Any, kind: Any = CompletionRequest) -> Any:
    """What ``read_request`` makes of what a client sends."""

    async def in_thread(function: Any, *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    return await reading.read_request(
        Request(scope, receive), kind, max_bytes=1 << 20, in_thread=in_thread
    )


def test_a_body_that_does_not_come_to_its_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_BODY_SECONDS", 0.05)
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
def test_a_body_of_very_many_things_is_refused_before_they_are_made(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "from_json", None)  # nobody calls it
    kind = ChatRequest if case == "messages" else CompletionRequest
    with pytest.raises(ApiError, match="16384 lists, objects and names"):
        run(read(whole(LARGE[case]), kind))


def whole(body: bytes) -> Any:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def test_what_looks_like_very_many_things_in_a_text_is_a_text() -> None:
    for text in ('[{"a": 1}]\\' * 20_000, '\\"[' * 20_000, ":" * 100_000):
        body = json.dumps({"model": "tiny", "prompt": text}).encode()
        assert run(read(whole(body))).prompt == text


@pytest.mark.parametrize("name", ["prompt", "messages", "content"])
def test_lists_have_a_limit_that_is_told(name: str) -> None:
    items: dict[str, Any] = {
        "prompt": ["a"] * 2049,
        "messages": [{"role": "user", "content": "a"}] * 2049,
        "content": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 129}],
    }
    asked = {"model": "tiny", ("prompt" if name == "prompt" else "messages"): items[name]}
    kind = CompletionRequest if name == "prompt" else ChatRequest
    with pytest.raises(ApiError, match="up to 128 parts" if name == "content" else "up to 2048"):
        run(read(whole(json.dumps(asked).encode()), kind))
