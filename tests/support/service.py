"""One service for all tests that do not stop it, its clients, and the same model unstreamed."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

from support.server import Server, running_server, save_chat_model

__all__ = [
    "CHAT",
    "CHAT_BODY",
    "COMPLETIONS",
    "GREEDY",
    "HOST",
    "KEY",
    "LONG_BODY",
    "LONG_TOKENS",
    "MAX_ANSWERS",
    "MAX_BODY",
    "MEMORY",
    "MESSAGES",
    "PROMPTS",
    "TEXT_BODY",
    "Reference",
    "client",
    "events",
    "folder",
    "gauge",
    "http",
    "idle",
    "reference",
    "send_request",
    "server",
]

KEY = "a-key"
MAX_ANSWERS = 12
MAX_BODY = 100_000
HOST = (
    "36MiB"  # libraries and the workload take 30 of these; weights of 8 MiB do not fit, and stream
)
LONG_TOKENS = 400
MEMORY = ("--concurrent", "4", "--prompt-tokens", "64")
PROMPTS = [
    "Hello",
    "The quick brown fox",
    "abc def",
    "x" * 50,
    "Ünïcödé ✓",
    "a",
    "0123456789",
    "\n\n",
]
GREEDY = {"model": "tiny", "temperature": 0}
LONG_BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": LONG_TOKENS, "temperature": 0}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
# Complete bodies of both kinds of requests.
TEXT_BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
CHAT_BODY = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}


class Reference(NamedTuple):
    """The model as transformers runs it, not streamed."""

    model: Any
    tokenizer: Any

    def ids(self, prompt: str, count: int, **options: Any) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        options = {"do_sample": False} | options
        return self.model.generate(ids, max_new_tokens=count, **options)[0, ids.shape[1] :].tolist()

    def text(self, prompt: str, count: int, **options: Any) -> str:
        return self.tokenizer.decode(self.ids(prompt, count, **options), skip_special_tokens=True)

    def finish_reason(self, prompt: str, count: int) -> str:
        ended = self.ids(prompt, count)[-1] == self.tokenizer.eos_token_id
        return "stop" if ended else "length"

    def chat(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    return Reference(
        transformers.LlamaForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    """A process whose model's weights stream from disk."""
    memory = (*MEMORY, "--new-tokens", str(LONG_TOKENS))
    limits = ("--max-answers", str(MAX_ANSWERS), "--max-body", str(MAX_BODY), "--reader", "direct")
    name = ("--served-model-name", "tiny", "--api-key", KEY)
    with running_server(folder, "--host", HOST, *memory, *limits, *name) as server:
        assert "every sweep reads 0 B" not in server.log
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    import httpx2 as httpx

    headers = {"Authorization": f"Bearer {KEY}".encode()}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


def gauge(http: Any, name: str) -> float:
    from prometheus_client import parser

    families = parser.text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples)


def idle(http: Any) -> bool:
    """Whether no request is running or waiting, in the service and in the model."""
    names = (
        "layerstream_open_answers",
        "layerstream_requests_riding",
        "layerstream_requests_waiting",
    )
    return not any(gauge(http, name) for name in names)


def events(text: str) -> list[Any]:
    """Parse a stream of server-sent events, "[DONE]" included."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def send_request(server: Server, body: dict[str, Any], *, missing: int = 0) -> socket.socket:
    """Send a completion request, announcing ``missing`` more bytes than are sent; returns the unread connection."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    length = len(content) + missing
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + content)
    return connection
