"""Hundreds of requests through the HTTP service: ``python -m layerstream.tools.benchmarks.soak PATH``.

Requests are of all APIs and have random lengths, and some are cancelled, cut off in mid-stream, or given up at a deadline.
Checks that the texts of completions that finish are the unstreamed model's, that the server stays within its budget, that
an idle server has no threads or descriptors left over, that every request is answered, and that the server's event loop is
late by 20 ms at most, in 99 of 100 cases. Needs the extras ``serve`` and ``test``.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from layerstream.stages.text import format_bytes
from layerstream.tools.benchmarks.soak_requests import (
    KINDS,
    MAX_ANSWERS,
    TEMPLATE,
    lag_at,
    mixed_request,
    starved_seconds,
)
from layerstream.tools.console.arguments import byte_count, positive_int

__all__ = ["main"]

_PROMPTS = 24
_LONGEST_PROMPT = 48
_SEED = 5
# An idle process to compare with: all code loaded, and the module tree without weights.
_IDLE_PROGRAM = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerstream.stages.process.usage import anonymous_bytes
from layerstream.tools.serving import app, server
from layerstream.tools.console.token_text import load_tokenizer

tokenizer = load_tokenizer(Path(sys.argv[1]))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
print(anonymous_bytes())
"""
_MAX_PASSES = 16  # the library's default
_MIXED = 0.5  # the share of requests that are no plain completions
_MAX_LAG_SECONDS = 0.02
_SHARES = (0.5, 0.99, 0.999)
_FATES = ("finish", "finish", "finish", "finish", "stream", "stream", "cancel", "leave", "deadline")


@dataclass(slots=True)
class Observations:
    """What the requests and the server have shown so far."""

    fates: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    """Seconds until the first token of a stream."""
    token_seconds: list[float] = field(default_factory=list)
    """Seconds of a whole request, per token."""
    ready_bytes: int = 0
    """Memory of the server before any request."""
    ready_threads: int = 0
    peak_bytes: int = 0


def main() -> int:
    """Run the soak and print its result; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a model with a tokenizer; it is also loaded whole")
    parser.add_argument("--requests", type=positive_int, default=500, help="(default: 500)")
    parser.add_argument("--at-once", type=positive_int, default=24, help="clients (default: 24)")
    parser.add_argument("--new-tokens", type=positive_int, default=32, help="at most (default: 32)")
    parser.add_argument("--host", type=byte_count, required=True, help="the server's host budget")
    args = parser.parse_args()
    before = _idle_bytes(args.path)
    prompts, texts = _expected_texts(args.path, new_tokens=args.new_tokens)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        server = _start_server(args, template.name)
        try:
            url = _wait_for_url(server)
            result = asyncio.run(_soak(url, server.pid, prompts, texts, args))
        finally:
            server.terminate()
            exit_code = server.wait(60)
    added = result.pop("peak_bytes") - before
    result["added_when_ready_bytes"] = result.pop("ready_bytes") - before
    result |= {"added_bytes": added, "host_budget_bytes": args.host, "exit_code": exit_code}
    print(json.dumps(result, indent=2))
    # The pool keeps as many threads as passes have ever run at once, each with torch's helper threads.
    max_threads = result["threads_when_ready"] + _MAX_PASSES * len(os.sched_getaffinity(0))
    before, after = result["descriptors"]
    clean = after <= before + 1 and result["threads"][1] <= max_threads
    prompt = result["loop_lag_seconds"]["99 %"] <= _MAX_LAG_SECONDS
    good = clean and not result["wrong"] and added <= args.host and exit_code == 0 and prompt
    print(f"{'good' if good else 'BAD'}: the server added {format_bytes(added)}", file=sys.stderr)
    return 0 if good else 1


def _start_server(args: argparse.Namespace, template: str) -> "subprocess.Popen[str]":
    memory = ["--concurrent", "4", "--prompt-tokens", str(_LONGEST_PROMPT)]
    memory += ["--new-tokens", str(args.new_tokens), "--host", str(args.host), "--reader", "direct"]
    command = [sys.executable, "-m", "layerstream.tools.cli", "serve", str(args.path), *memory]
    command += ["--device", "cpu", "--port", "0", "--served-model-name", "soaked"]
    command += ["--no-access-log", "--chat-template", template]
    command += ["--max-answers", str(args.at_once * MAX_ANSWERS)]  # none is refused
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own


def _wait_for_url(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None  # noqa: S101
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if (found := re.search(r"ready on (http://\S+)", line)) is not None:
            return found[1]
    raise SystemExit("the server did not start")


def _idle_bytes(path: Path) -> int:
    """Measure the anonymous memory of an idle process."""
    command = [sys.executable, "-c", _IDLE_PROGRAM, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def _expected_texts(path: Path, *, new_tokens: int) -> tuple[list[list[int]], list[list[str]]]:
    """Make prompts, and the greedy text of every length for each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    rng = random.Random(_SEED)
    prompts, texts = [], []
    for _ in range(_PROMPTS):
        prompt = [rng.randrange(32, 127) for _ in range(rng.randrange(1, _LONGEST_PROMPT))]
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        new_ids = output[0, len(prompt) :].tolist()
        prompts.append(prompt)
        texts.append(
            [
                tokenizer.decode(new_ids[:count], skip_special_tokens=True)
                for count in range(new_tokens + 1)
            ]
        )
    return prompts, texts


async def _soak(
    url: str,
    pid: int,
    prompts: Sequence[list[int]],
    texts: Sequence[Sequence[str]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    observed = Observations(ready_bytes=_anonymous_bytes(pid), ready_threads=_threads(pid))
    clients = asyncio.Semaphore(args.at_once)
    limits = httpx2.Limits(max_keepalive_connections=0)  # kept ones would be open descriptors
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def run_request(number: int) -> None:
            async with clients:
                await _send_request(
                    http, number, prompts, texts, observed=observed, new_tokens=args.new_tokens
                )

        watcher = asyncio.create_task(_watch_memory(pid, observed))
        starved = starved_seconds(pid)
        began = time.monotonic()
        half = args.requests // 2
        await asyncio.gather(*map(run_request, range(half)))
        halfway = await _usage_when_idle(http, pid)
        await asyncio.gather(*map(run_request, range(half, args.requests)))
        seconds = time.monotonic() - began
        at_end = await _usage_when_idle(http, pid)
        watcher.cancel()
        sweeps = await _metric(http, "layerstream_sweeps_total")
        tokens = await _metric(http, "layerstream_generated_tokens_total")
        metrics = (await http.get("/metrics")).text
        starved = starved_seconds(pid) - starved
    return {
        "requests": args.requests,
        "at_once": args.at_once,
        "seconds": seconds,
        "fates": dict(observed.fates),
        "kinds": dict(observed.kinds),
        "wrong": observed.wrong[:8],
        "sweeps": sweeps,
        "tokens_per_sweep": tokens / sweeps,
        "first_token_seconds": _spread(observed.first_seconds),
        "seconds_per_token": _spread(observed.token_seconds),
        "loop_lag_seconds": {f"{100 * share:g} %": lag_at(metrics, share) for share in _SHARES},
        # On a busy machine, the loop is late without being held by anything of its process.
        "loop_waited_for_a_processor_seconds": starved,
        "threads_when_ready": observed.ready_threads,
        "threads": [halfway[0], at_end[0]],
        "descriptors": [halfway[1], at_end[1]],
        "idle_bytes": [halfway[2], at_end[2]],
        "ready_bytes": observed.ready_bytes,
        "peak_bytes": observed.peak_bytes,
    }


async def _send_request(
    http: httpx2.AsyncClient,
    number: int,
    prompts: Sequence[list[int]],
    texts: Sequence[Sequence[str]],
    *,
    observed: Observations,
    new_tokens: int,
) -> None:
    """Send request ``number``, with a random prompt, length and end."""
    rng = random.Random(number)
    fate, which = rng.choice(_FATES), rng.randrange(len(prompts))
    count = rng.randrange(1, new_tokens + 1)
    body = {"model": "soaked", "prompt": prompts[which], "max_tokens": count, "temperature": 0}
    deadline = rng.random() if fate in {"cancel", "deadline"} else 300
    began = time.monotonic()
    text: str | None = None
    mixed = rng.random() < _MIXED
    try:
        async with asyncio.timeout(deadline):
            if mixed:
                await _send_mixed(http, rng, observed, new_tokens, leave=fate == "leave")
            elif fate in {"stream", "leave"}:
                text = await _stream_text(
                    http, body, observed, leave_after=1 if fate == "leave" else None
                )
            else:
                answer = await http.post("/v1/completions", json=body)
                answer.raise_for_status()
                text = answer.json()["choices"][0]["text"]
    except TimeoutError:
        if deadline >= 300:  # noqa: PLR2004
            observed.wrong.append(f"request {number} was never answered")
    except httpx2.HTTPError as error:
        observed.wrong.append(f"request {number}: {error!r}")
    done = mixed and fate not in {"cancel", "deadline", "leave"}
    observed.fates[fate if (text is None and not done) or fate == "leave" else "finished"] += 1
    if text is not None and fate != "leave":
        observed.token_seconds.append((time.monotonic() - began) / count)
        if text != texts[which][count]:
            observed.wrong.append(f"request {number}: {text!r} is not {texts[which][count]!r}")


async def _send_mixed(
    http: httpx2.AsyncClient,
    rng: random.Random,
    observed: Observations,
    new_tokens: int,
    *,
    leave: bool,
) -> None:
    """Send a request of any kind; ``leave`` closes the connection when its answer begins."""
    kind = rng.choice(KINDS)
    observed.kinds[kind] += 1
    path, body, status = mixed_request(
        kind, rng, model="soaked", longest=_LONGEST_PROMPT, new_tokens=new_tokens
    )
    async with http.stream("POST", path, json=body) as answer:
        if answer.status_code != status:
            observed.wrong.append(f"{kind}: {answer.status_code} {await answer.aread()!r}")
        if not leave:
            await answer.aread()


async def _stream_text(
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    observed: Observations,
    *,
    leave_after: int | None,
) -> str:
    """Return the text of a streamed answer; ``leave_after`` closes the connection after so many events."""
    began = time.monotonic()
    pieces: list[str] = []
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not pieces:
                observed.first_seconds.append(time.monotonic() - began)
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            if leave_after is not None and len(pieces) >= leave_after:
                break
    return "".join(pieces)


async def _watch_memory(pid: int, observed: Observations) -> None:
    while True:
        observed.peak_bytes = max(observed.peak_bytes, _anonymous_bytes(pid))
        await asyncio.sleep(0.02)


def _anonymous_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text)))


async def _usage_when_idle(http: httpx2.AsyncClient, pid: int) -> tuple[int, int, int]:
    """Wait until the server is idle; returns its threads, descriptors and bytes."""
    names = ("open_answers", "requests_riding", "requests_waiting", "reserved_bytes")
    async with asyncio.timeout(60):
        while any(  # noqa: ASYNC110 - another process cannot set an event
            [await _metric(http, f"layerstream_{name}") for name in names]
        ):
            await asyncio.sleep(0.05)
    return _threads(pid), len(os.listdir(f"/proc/{pid}/fd")), _anonymous_bytes(pid)  # noqa: PTH208


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


async def _metric(http: httpx2.AsyncClient, name: str) -> float:
    text = (await http.get("/metrics")).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
