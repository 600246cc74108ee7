"""llama.cpp through its own server: a prompt is evaluated per request, the weights are mapped once."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["llama_server", "server_version"]

_LOOK_SECONDS = 0.05


def server_version(server: str) -> str:
    """What the server says of itself."""
    ran = subprocess.run(  # noqa: S603 - the user's own server
        [server, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    lines = (ran.stderr + ran.stdout).splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown version")


@contextmanager
def llama_server(
    server: str, *, weights: Path, prompt: Sequence[int], port: int
) -> Iterator[tuple[Callable[[], float], int]]:
    """Start the server; gives a call that evaluates ``prompt`` and returns its seconds, and the server's process id.

    Its defaults hold (mapped weights, as many threads as it sees fit), but that it warms up nothing before,
    keeps no results, and has room for one request of this length.

    Raises:
        RuntimeError: It ended, or did not evaluate every token.
    """
    room = str(-(-(len(prompt) + 1) // 256) * 256)
    command = [server, "--model", str(weights), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", room, "--parallel", "1", "--no-warmup", "--cache-ram", "0"]
    process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)  # noqa: S603 - the user's own server
    url = f"http://127.0.0.1:{port}"
    asked = {"prompt": list(prompt), "n_predict": 0, "cache_prompt": False}

    def evaluate() -> float:
        timings = _request(f"{url}/completion", asked)["timings"]
        if timings["prompt_n"] != len(prompt):
            raise RuntimeError(
                f"llama-server evaluated {timings['prompt_n']} of {len(prompt)} tokens"
            )
        return float(timings["prompt_ms"]) / 1000

    try:
        _wait_until_ready(process, url)
        yield evaluate, process.pid
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    while True:
        if (code := process.poll()) is not None:
            raise RuntimeError(f"llama-server ended with code {code} before it was ready")
        try:
            _request(f"{url}/health", None)
        except OSError:  # not yet listening, or still loading
            time.sleep(_LOOK_SECONDS)
        else:
            return


def _request(url: str, asked: Any) -> Any:
    data = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            return json.load(reply)
    except urllib.error.HTTPError as error:
        if asked is None:
            raise
        raise RuntimeError(f"llama-server: {error.read().decode(errors='replace')}") from error
