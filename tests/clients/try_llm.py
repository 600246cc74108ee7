"""Tries llm, as a library and as a command, with the server as an OpenAI-compatible model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from checking import CASE, check, run_checks

CHAT, TOOLS = CASE["chat"], CASE["tools"]
FOLDER = Path("llm").resolve()
FOLDER.mkdir()
os.environ |= {"LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": CASE["key"]}
(FOLDER / "extra-openai-models.yaml").write_text(
    json.dumps(
        [
            {
                "model_id": "plain",
                "model_name": CASE["model"],
                "api_base": f"{CASE['url']}/v1",
                "api_key_name": "plain",
            },
            {
                "model_id": "agent",
                "model_name": TOOLS["model"],
                "api_base": f"{TOOLS['url']}/v1",
                "supports_tools": True,
                "api_key_name": "plain",
            },
        ]
    )
)
(FOLDER / "keys.json").write_text(json.dumps({"plain": CASE["key"]}))

import llm  # noqa: E402 - reads its settings from the folder

SYSTEM, ASKED = (each["content"] for each in CHAT["messages"])
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": CHAT["max_tokens"]}


def _is_chat(done: Any) -> None:
    assert done.text() == CHAT["text"]
    usage = done.usage()
    assert (usage.input, usage.output) == (CHAT["prompt_tokens"], CHAT["new_tokens"])


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    done = llm.get_model("plain").prompt(ASKED, system=SYSTEM, stream=False, **OPTIONS)
    _is_chat(done)
    assert done.json()["choices"][0]["finish_reason"] == CHAT["finish_reason"]


@check
def streamed_chat() -> None:
    """A stream has the same."""
    done = llm.get_model("plain").prompt(ASKED, system=SYSTEM, **OPTIONS)
    assert len(list(done)) > 1
    _is_chat(done)


@check
def command() -> None:
    """The command prints the text."""
    options = [each for name, value in OPTIONS.items() for each in ("-o", name, str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "plain", "-s", SYSTEM, *options, ASKED],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == CHAT["text"] + "\n"


@check
def tools() -> None:
    """A chain of prompts calls the tool, and ends with what the model says to its answer."""
    calls: list[Any] = []

    def look(at: str, times: int) -> str:
        """Looks."""
        calls.append({"at": at, "times": times})
        return str(TOOLS["result"])

    for stream in (False, True):
        calls.clear()
        chain = llm.get_model("agent").chain(
            TOOLS["messages"][0]["content"],
            tools=[look],
            stream=stream,
            options=OPTIONS | {"max_tokens": TOOLS["max_tokens"]},
        )
        assert chain.text().endswith(TOOLS["after"]["text"])
        assert calls == [TOOLS["call"]["arguments"]]


run_checks()
