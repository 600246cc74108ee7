"""Hundreds of requests through the HTTP service: ``python -m layerstream.tools.benchmarks.soak PATH``.

Requests of random lengths, of which some are cancelled, cut off in mid-stream, or given up at a deadline. Checked:
the texts of those that finish are the unstreamed model's; the server stays within its budget; nothing is left of
anybody when it is quiet; nobody waits for ever. Needs the extras ``serve`` and ``test``.
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
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from layerstream.stages.text import format_bytes
from layerstream.tools.console.arguments import positive, size

__all__ = ["main"]

_PROMPTS = 24
_LONGEST_PROMPT = 48
_SEED = 5
# Has everything but the model: its code, and a tree without weights.
_IDLE = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerstream.stages.process.usage import anonymous_bytes
from layerstream.tools.serving import app, server
from layerstream.tools.text import load_tokenizer

tokenizer = load_tokenizer(Path(sys.argv[1]))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
print(anonymous_bytes())
"""
_PLACES = 16  # the library's default
_FATES = ("finish", "finish", "finish", "finish", "stream", "stream", "cancel", "leave", "deadline")


@dataclass(slots=True)
class Soak:
    """What has been seen."""

    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    """Until the first token of a stream."""
    token_seconds: list[float] = field(default_factory=list)
    """Of a whole request, per token."""
    ready_bytes: int = 0
    """Before any request."""
    ready_threads: int = 0
    peak_bytes: int = 0


def main() -> int:
    """Run the soak and print its result; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a model with a tokenizer; it is also loaded whole")
    parser.add_argument("--requests", type=positive, default=500, help="(default: 500)")
    parser.add_argument("--at-once", type=positive, default=24, help="clients (default: 24)")
    parser.add_argument("--new-tokens", type=positive, default=32, help="at most (default: 32)")
    parser.add_argument("--host", type=size, required=True, help="the server's host budget")
    args = parser.parse_args()
    before = _idle_bytes(args.path)
    prompts, texts = _expected(args.path, new_tokens=args.new_tokens)
    server = _start(args)
    try:
        url = _url(server)
        result = asyncio.run(_soak(url, server.pid, prompts, texts, args))
    finally:
        server.terminate()
        code = server.wait(60)
    added = result.pop("peak_bytes") - before
    result["added_when_ready_bytes"] = result.pop("ready_bytes") - before
    result |= {"added_bytes": added, "host_budget_bytes": args.host, "exit_code": code}
    print(json.dumps(result, indent=2))
    # Places are taken, and then kept, by as many as have ever run at once: each with a thread, and torch's helpers.
    most = result["threads_when_ready"] + _PLACES * len(os.sched_getaffinity(0))
    before, after = result["descriptors"]
    clean = after <= before + 1 and result["threads"][1] <= most
    good = clean and not result["wrong"] and added <= args.host and code == 0
    print(f"{'good' if good else 'BAD'}: the server added {format_bytes(added)}", file=sys.stderr)
    return 0 if good else 1


def _start(args: argparse.Namespace) -> "subprocess.Popen[str]":
    memory = ["--concurrent", "4", "--prompt-tokens", str(_LONGEST_PROMPT)]
    memory += ["--new-tokens", str(args.new_tokens), "--host", str(args.host), "--reader", "direct"]
    command = [sys.executable, "-m", "layerstream.tools.cli", "serve", str(args.path), *memory]
    command += [
        "--device",
        "cpu",
        "--port",
        "0",
        "--served-model-name",
        "soaked",
        "--no-access-log",
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own


def _url(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None  # noqa: S101
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if (found := re.search(r"ready on (http://\S+)", line)) is not None:
            return found[1]
    raise SystemExit("the server did not start")


def _idle_bytes(path: Path) -> int:
    """Anonymous memory of a process that is idle."""
    command = [sys.executable, "-c", _IDLE, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def _expected(path: Path, *, new_tokens: int) -> tuple[list[list[int]], list[list[str]]]:
    """Prompts, and for each of them the greedy text of every length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    choose = random.Random(_SEED)
    prompts, texts = [], []
    for _ in range(_PROMPTS):
        prompt = [choose.randrange(32, 127) for _ in range(choose.randrange(1, _LONGEST_PROMPT))]
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        new = made[0, len(prompt) :].tolist()
        prompts.append(prompt)
        texts.append(
            [
                tokenizer.decode(new[:count], skip_special_tokens=True)
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
    seen = Soak(ready_bytes=_anonymous_bytes(pid), ready_threads=_threads(pid))
    places = asyncio.Semaphore(args.at_once)
    # Kept connections would be descriptors that are open for a reason.
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def one(number: int) -> None:
            async with places:
                await _request(http, number, prompts, texts, seen=seen, new_tokens=args.new_tokens)

        watching = asyncio.create_task(_watch(pid, seen))
        began = time.monotonic()
        half = args.requests // 2
        await asyncio.gather(*map(one, range(half)))
        warm = await _rest(http, pid)
        await asyncio.gather(*map(one, range(half, args.requests)))
        seconds = time.monotonic() - began
        cold = await _rest(http, pid)
        watching.cancel()
        sweeps = await _value(http, "layerstream_sweeps_total")
        tokens = await _value(http, "layerstream_generated_tokens_total")
    return {
        "requests": args.requests,
        "at_once": args.at_once,
        "seconds": seconds,
        "fates": dict(seen.fates),
        "wrong": seen.wrong[:8],
        "sweeps": sweeps,
        "tokens_per_sweep": tokens / sweeps,
        "first_token_seconds": _spread(seen.first_seconds),
        "seconds_per_token": _spread(seen.token_seconds),
        "threads_when_ready": seen.ready_threads,
        "threads": [warm[0], cold[0]],  # before and after; the same for descriptors
        "descriptors": [warm[1], cold[1]],
        "ready_bytes": seen.ready_bytes,
        "peak_bytes": seen.peak_bytes,
    }


async def _request(
    http: httpx2.AsyncClient,
    number: int,
    prompts: Sequence[list[int]],
    texts: Sequence[Sequence[str]],
    *,
    seen: Soak,
    new_tokens: int,
) -> None:
    """Make request ``number``, and end it as chance has it."""
    choose = random.Random(number)
    fate, which = choose.choice(_FATES), choose.randrange(len(prompts))
    count = choose.randrange(1, new_tokens + 1)
    body = {"model": "soaked", "prompt": prompts[which], "max_tokens": count, "temperature": 0}
    deadline = choose.random() if fate in {"cancel", "deadline"} else 300
    began = time.monotonic()
    text: str | None = None
    try:
        async with asyncio.timeout(deadline):
            if fate in {"stream", "leave"}:
                text = await _streamed(http, body, seen, leave=1 if fate == "leave" else None)
            else:
                answer = await http.post("/v1/completions", json=body)
                answer.raise_for_status()
                text = answer.json()["choices"][0]["text"]
    except TimeoutError:
        if deadline >= 300:  # noqa: PLR2004
            seen.wrong.append(f"request {number} was never answered")
    except httpx2.HTTPError as error:
        seen.wrong.append(f"request {number}: {error!r}")
    seen.fates[fate if text is None or fate == "leave" else "finished"] += 1
    if text is not None and fate != "leave":
        seen.token_seconds.append((time.monotonic() - began) / count)
        if text != texts[which][count]:
            seen.wrong.append(f"request {number}: {text!r} is not {texts[which][count]!r}")


async def _streamed(
    http: httpx2.AsyncClient, body: dict[str, Any], seen: Soak, *, leave: int | None
) -> str:
    """The text of a streamed answer; with ``leave``, after so many events the connection is closed."""
    began = time.monotonic()
    pieces: list[str] = []
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not pieces:
                seen.first_seconds.append(time.monotonic() - began)
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            if leave is not None and len(pieces) >= leave:
                break
    return "".join(pieces)


async def _watch(pid: int, seen: Soak) -> None:
    while True:
        seen.peak_bytes = max(seen.peak_bytes, _anonymous_bytes(pid))
        await asyncio.sleep(0.02)


def _anonymous_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text)))


async def _rest(http: httpx2.AsyncClient, pid: int) -> tuple[int, int]:
    """Threads and descriptors when everybody has left, and the model knows it."""
    names = ("open_answers", "requests_riding", "requests_waiting", "reserved_bytes")
    async with asyncio.timeout(60):
        while any(  # noqa: ASYNC110 - another process has no events for us
            [await _value(http, f"layerstream_{name}") for name in names]
        ):
            await asyncio.sleep(0.05)
    return _threads(pid), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


async def _value(http: httpx2.AsyncClient, name: str) -> float:
    text = (await http.get("/metrics")).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
