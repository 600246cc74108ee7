"""`layerstream serve` is told to end while a client is still sending the body of its request."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.server import running_server

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_half_a_body_at_shutdown_leaves_no_traceback(folder: Path, path: str) -> None:
    with running_server(folder, "--shutdown-seconds", "0") as server:
        url = urlsplit(server.url)
        with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f'{head}Content-Length: 100\r\n\r\n{{"model": '.encode())
            # When this is answered, the half has been read.
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
            before = len(server.lines)
            server.process.terminate()
            assert server.wait() == 0
            answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"shutting down" in answer
        log = [line for line in server.lines[before:] if not line.startswith("uvicorn.access")]
        assert len(log) == 1  # that it is shutting down
