"""Tries guidellm: a short benchmark of completions and one of chats."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from checking import CASE, check, run_checks

ASKED, TEXT = CASE["asked"], CASE["completion"]
COUNT = 3


def _benchmark(path: str, prompt: str) -> Any:
    """The requests of a benchmark, as its report has them."""
    data, scenario, report = (
        Path(name).resolve() for name in ("data.jsonl", "scenario.json", "report.json")
    )
    row = json.dumps({"prompt": prompt, "output_tokens_count": 16})
    data.write_text(f"{row}\n" * COUNT)
    spec = {
        "backend": {
            "kind": "openai_http",
            "target": CASE["url"],
            "model": CASE["model"],
            "api_key": CASE["key"],
            "request_format": path,
            "extras": {"body": {"temperature": 0}},
        },
        "profile": {"kind": "synchronous"},
        "constraints": [{"kind": "max_requests", "count": COUNT}],
        "tokenizer": {"kind": "hf_auto", "model": CASE["folder"]},
        "data": [{"kind": "json_file", "path": str(data)}],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario.write_text(json.dumps({"metadata": {"name": "short"}, "spec": spec}))
    command = [sys.executable, "-m", "guidellm", "run", "--config", str(scenario)]
    subprocess.run([*command, "--disable-console"], check=True)
    return json.loads(report.read_text("utf-8"))["benchmarks"][0]


def _is(benchmark: Any, text: str, prompt_tokens: int, new_tokens: int) -> None:
    requests = benchmark["requests"]
    assert (requests["errored"], requests["incomplete"]) == ([], [])
    assert len(requests["successful"]) == COUNT
    for request in requests["successful"]:
        assert request["output"] == text
        assert request["prompt_tokens"] == prompt_tokens
        assert request["output_tokens"] == new_tokens


@check
def completions() -> None:
    """Text completions have the model's text and usage."""
    found = _benchmark("/v1/completions", TEXT["prompt"])
    _is(found, TEXT["text"], TEXT["prompt_tokens"], TEXT["new_tokens"])


@check
def chats() -> None:
    """So have chats."""
    found = _benchmark("/v1/chat/completions", ASKED["prompt"])
    _is(found, ASKED["text"], ASKED["prompt_tokens"], ASKED["new_tokens"])


run_checks()
