"""Runs llama.cpp through its own server: each request evaluates the prompt, the weights stay mapped."""

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

_POLL_SECONDS = 0.05


def server_version(server: str) -> str:
    """The version that the server reports."""
    ran = subprocess.run(  # noqa: S603 - the user's own server
        [server, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    lines = (ran.stderr + ran.stdout).splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown version")


@contextmanager
def llama_server(
    server: str, *, weights: Path, prompt: Sequence[int], port: int
) -> Iterator[tuple[Callable[[], float], int]]:
    """Start the server; yields a function that evaluates ``prompt`` and returns the seconds, and the process id.

    It runs with its defaults (mapped weights, its own number of threads), but without warm-up and prompt cache, and
    with a context for one request of this length.

    Raises:
        RuntimeError: The server ended, or did not evaluate every token.
    """
    context_tokens = str(-(-(len(prompt) + 1) // 256) * 256)
    command = [server, "--model", str(weights), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", context_tokens, "--parallel", "1", "--no-warmup", "--cache-ram", "0"]
    process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)  # noqa: S603 - the user's own server
    url = f"http://127.0.0.1:{port}"
    content = {"prompt": list(prompt), "n_predict": 0, "cache_prompt": False}

    def evaluate() -> float:
        timings = _request(f"{url}/completion", content)["timings"]
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
            time.sleep(_POLL_SECONDS)
        else:
            return


def _request(url: str, content: Any) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            return json.load(reply)
    except urllib.error.HTTPError as error:
        if content is None:
            raise
        raise RuntimeError(f"llama-server: {error.read().decode(errors='replace')}") from error
