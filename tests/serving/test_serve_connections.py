"""`layerstream serve`: clients that close their side, do not read, or are more than there are descriptors."""

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.loop import run
from support.server import Server, running_server, wait_until
from support.service import COMPLETIONS, KEY, LONG_BODY, TEXT_BODY, Reference, gauge, send_request

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
uvicorn = pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")

from uvicorn.server import ServerState  # noqa: E402

from layerstream.tools.serving import connections, event_stream  # noqa: E402
from layerstream.tools.serving.event_stream import EventStream, KeepAlive, LateJson  # noqa: E402

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HOUR = KeepAlive(seconds=3600, describe=lambda: "waiting")


@contextlib.asynccontextmanager
async def serving(app: Any, *, most: int = 10) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Serve ``app``; yields a function that connects, and returns a client's streams."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: connections.Connection(most=most, config=config, server_state=state, app_state={}),
        "127.0.0.1",
        0,
    )
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server)

        async def connect() -> Any:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            stack.callback(writer.close)
            return reader, writer

        yield connect


async def hello(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


def received(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


# -- a client that closes its side ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_closed_its_side_gets_its_answer(
    stream: bool, server: Server, reference: Reference
) -> None:
    connection = send_request(server, TEXT_BODY | {"stream": stream, "temperature": 0})
    connection.shutdown(socket.SHUT_WR)
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    # The model may have ended early, or spelled a character in several tokens.
    text = reference.text("Hello", 4)
    assert (b"[DONE]" in answer) if stream else (text.encode() in answer)


def test_requests_that_wait_behind_another_are_answered_after_their_client_has_closed_its_side() -> (
    None
):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        waiting = asyncio.create_task(event_stream.client_left(receive))  # it reads
        await scope["state"][connections.HALF_CLOSED].wait()
        assert not waiting.done()
        await hello(scope, receive, send)
        await waiting

    async def main() -> None:
        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write(3 * GET)
            writer.write_eof()
            assert (await reader.read()).count(b"hello") == 3

    run(main())


@pytest.mark.parametrize("partial", [b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-"])
def test_a_request_that_will_not_be_complete_is_not_waited_for(partial: bytes) -> None:
    async def main() -> None:
        async with serving(hello) as connect:
            reader, writer = await connect()
            writer.write(partial)
            writer.write_eof()
            assert await reader.read() == b""

    run(main())


@pytest.mark.parametrize("kind", ["stream", "whole"])
def test_a_client_that_leaves_is_noticed_though_nothing_is_to_be_sent(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "_PROBE_SECONDS", 0.01)
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.01)

    async def main() -> None:
        begun, noticed = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def wait() -> None:
                begun.set()
                await event_stream.client_left(receive)
                noticed.set()

            async def produce(emit: Any) -> None:
                await emit(())
                await wait()

            if kind == "stream":
                answer: Any = EventStream(produce, keep_alive=HOUR, ending="", failed=str)
            else:
                answer = LateJson(wait, keep_alive=HOUR)
            await answer(scope, receive, send)

        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write(GET)
            await begun.wait()
            if kind == "stream":  # a client that leaves something unread tells so at once
                await reader.readuntil(b"\r\n\r\n")
            writer.close()
            await noticed.wait()

    run(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [("Content-Length: 99999999", b"413"), ("Content-Length: 2\r\nOrigin: http://other", b"403")],
)
def test_the_connection_of_a_body_that_is_refused_before_it_comes_is_closed(
    headers: str, status: bytes, server: Server
) -> None:
    # Whether the body follows now, or another request, nobody could tell.
    url = urlsplit(server.url)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nExpect: 100-continue\r\n{headers}\r\n\r\n"
    connection = socket.create_connection((url.hostname, url.port), timeout=60)
    connection.sendall(head.encode())
    answer = received(connection)
    assert answer.split()[1] == status
    assert b"connection: close" in answer.lower()


# -- clients that do not read, and too many ------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_UNREAD_SECONDS", 0.1)

    async def main() -> None:
        left = asyncio.Event()

        async def app(_scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            waiting = asyncio.create_task(event_stream.client_left(receive))
            while not waiting.done():
                body = bytes(1 << 20)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            left.set()

        async with serving(app) as connect:
            _, writer = await connect()
            writer.transport.pause_reading()
            writer.write(GET)
            await left.wait()

    run(main())


def test_one_connection_too_many_closes_the_one_that_has_been_idle_for_the_longest() -> None:
    async def main() -> None:
        answered = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                await answered.wait()
            await hello(scope, receive, send)

        async with serving(app, most=3) as connect:
            clients = [await connect() for _ in range(3)]
            for number, path in ((1, b"/"), (0, b"/slow")):
                clients[number][1].write(GET.replace(b"/", path, 1))
            await clients[1][0].readuntil(b"hello")
            newest = await connect()
            assert await clients[2][0].read() == b""  # it has not sent anything
            newest[1].write(GET)
            await newest[0].readuntil(b"hello")
            answered.set()
            await clients[0][0].readuntil(b"hello")

    run(main())


def test_a_client_that_never_reads_does_not_delay_the_end(folder: Path) -> None:
    with running_server(folder, "--served-model-name", "tiny", "--shutdown-seconds", "0") as server:
        url = urlsplit(server.url)
        # Some five megabytes, most of which are sent with the first tokens.
        large = {"prompt": "x" * 3000, "echo": True, "logprobs": 5, "n": 8, "max_tokens": 50}
        body = json.dumps(LONG_BODY | large | {"stream": True, "ignore_eos": True})
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\n"
        with socket.socket() as connection, httpx.Client(base_url=server.url, timeout=60) as http:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect((url.hostname, url.port))
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            counts: list[float] = [0.0]

            def nothing_moves() -> bool:
                counts.append(gauge(http, "layerstream_answer_tokens_total"))
                return 0 < counts[-1] == counts[-20:][0]

            wait_until(nothing_moves)
            assert counts[-1] < 8 * 50
            server.process.terminate()
            assert server.wait() == 0
        assert "timeout graceful shutdown exceeded" not in server.log


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="another process cannot be limited")
def test_a_service_out_of_descriptors_says_so_once_and_accepts_again(folder: Path) -> None:
    with running_server(folder, "--served-model-name", "tiny", "--api-key", KEY) as server:
        number = server.process.pid
        _, hard = resource.prlimit(number, resource.RLIMIT_NOFILE)
        most = 4 + sum(1 for _ in Path(f"/proc/{number}/fd").iterdir())
        url = urlsplit(server.url)
        with contextlib.ExitStack() as stack:
            resource.prlimit(number, resource.RLIMIT_NOFILE, (most, hard))
            for _ in range(12):
                stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=60))
            wait_until(lambda: os.strerror(errno.EMFILE) in server.log)
        connection = send_request(server, TEXT_BODY)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection).startswith(b"HTTP/1.1 200 OK")
        assert server.log.count(os.strerror(errno.EMFILE)) == 1
        assert COMPLETIONS in server.log
