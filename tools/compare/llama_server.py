"""Runs llama.cpp through its own server; the weights stay mapped."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.tools.compare.cgroups import MemoryCgroup

__all__ = ["LlamaServer", "llama_server", "server_version"]

_POLL_SECONDS = 0.05


def server_version(server: str) -> str:
    """The version that the server reports."""
    ran = subprocess.run(  # noqa: S603 - the user's own server
        [server, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    lines = (ran.stderr + ran.stdout).splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown version")


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A server that runs."""

    pid: int
    url: str

    def prompt_seconds(self, prompt: Sequence[int], *, new_tokens: int | None = None) -> float:
        """Evaluate ``prompt``; returns the seconds that the server measured.

        Args:
            prompt: The whole of it.
            new_tokens: How many at its end were not in the last call's prompt, whose cache is used; None: all, without a cache.

        Raises:
            RuntimeError: It did not evaluate these tokens.
        """
        content = {"prompt": list(prompt), "n_predict": 0, "cache_prompt": new_tokens is not None}
        with _request(f"{self.url}/completion", content) as reply:
            timings = json.load(reply)["timings"]
        wanted = len(prompt) if new_tokens is None else new_tokens
        if timings["prompt_n"] != wanted:
            raise RuntimeError(f"llama-server evaluated {timings['prompt_n']} of {wanted} tokens")
        return float(timings["prompt_ms"]) / 1000

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """The ``count`` greedy tokens after ``prompt``, as they come."""
        content = {"prompt": list(prompt), "n_predict": count, "cache_prompt": False}
        content |= {"temperature": 0, "ignore_eos": True, "stream": True, "return_tokens": True}
        with _request(f"{self.url}/completion", content) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    yield from json.loads(line.removeprefix(b"data: ")).get("tokens", [])


@contextmanager
def llama_server(
    server: str,
    *,
    weights: Path,
    context_tokens: int,
    port: int,
    group: MemoryCgroup | None = None,
) -> Iterator[LlamaServer]:
    """Start the server, in ``group``.

    It runs with its defaults (mapped weights, its own number of threads), but without warm-up and prompt cache, and
    with a context for one request of ``context_tokens``.

    Raises:
        RuntimeError: The server ended.
    """
    context = str(-(-(context_tokens + 1) // 256) * 256)
    command = [server, "--model", str(weights), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", context, "--parallel", "1", "--no-warmup", "--cache-ram", "0"]
    inside = group.inside(command) if group else command
    process = subprocess.Popen(inside, stdout=sys.stderr, stderr=sys.stderr)  # noqa: S603 - the user's own server
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url)
        yield LlamaServer(process.pid, url)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    while True:
        if (code := process.poll()) is not None:
            raise RuntimeError(f"llama-server ended with code {code} before it was ready")
        try:
            _request(f"{url}/health", None).close()
        except OSError:  # not yet listening, or still loading
            time.sleep(_POLL_SECONDS)
        else:
            return


def _request(url: str, content: Any) -> Any:
    """The reply, to be read within a ``with``."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    try:
        return urllib.request.urlopen(request)  # noqa: S310
    except urllib.error.HTTPError as error:
        if content is None:
            raise
        raise RuntimeError(f"llama-server: {error.read().decode(errors='replace')}") from error
