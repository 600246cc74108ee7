"""`layerstream serve`: requests of all APIs, some of whose clients leave, and what is left of them."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.server import Server, wait_until
from support.service import KEY, gauge, idle

from layerstream.tools.benchmarks.soak_requests import KINDS, lag_at, mixed_request

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

COUNT = 45


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def send(server: Server, number: int) -> str | None:
    """Send request ``number``, which a third of the clients leave; returns what is wrong with its answer."""
    rng = random.Random(number)
    path, body, status = mixed_request(
        KINDS[number % len(KINDS)], rng, model="tiny", longest=40, new_tokens=12
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    leaves = number % 3 == 0
    with (
        httpx.Client(base_url=server.url, headers=headers, timeout=300) as http,
        http.stream("POST", path, json=body) as answer,
    ):
        if answer.status_code == 429:  # the service takes a dozen answers
            return None
        if answer.status_code != status:
            return f"{path}: {answer.status_code} {answer.read()!r}"
        if not leaves:
            answer.read()
    return None


def test_nothing_is_left_of_requests_of_all_kinds(server: Server, http: Any) -> None:
    wait_until(lambda: idle(http))
    before = descriptors(server)
    with ThreadPoolExecutor(6) as pool:
        wrong = [each for each in pool.map(lambda n: send(server, n), range(COUNT)) if each]
    assert wrong == []
    wait_until(lambda: idle(http) and gauge(http, "layerstream_reserved_bytes") == 0)
    wait_until(lambda: descriptors(server) <= before)


def test_the_lag_of_the_loop_is_measured_while_there_are_requests(http: Any) -> None:
    text = http.get("/metrics").text
    assert gauge(http, "layerstream_loop_lag_seconds_count") > 0
    # How long it was depends on what else the machine does.
    assert 0 < lag_at(text, 0.5) <= lag_at(text, 0.99)
