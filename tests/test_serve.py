"""`layerstream serve`: a real process, real sockets, and the real openai client."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support.loop import run
from support.server import CONTEXT_TOKENS, Server, save_speaking_model, serving, until

from layerstream.tools.cli import main

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
parser = pytest.importorskip("prometheus_client.parser", reason="needs layerstream[serve]")

from pydantic import BaseModel, ValidationError  # noqa: E402 - it comes with fastapi

from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402

KEY = "a-key"
MAX_BODY = 100_000
HOST = "32MiB"  # 27 are taken by transformers' code and the workload; the weights have 8, so that they stream
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
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(
        transformers.LlamaForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """One for all tests that do not end it. Its weights stream from disk."""
    memory = (*MEMORY, "--new-tokens", str(LONG_TOKENS))
    limits = ("--max-answers", "12", "--max-body", str(MAX_BODY), "--reader", "direct")
    name = ("--served-model-name", "tiny", "--api-key", KEY)
    with serving(folder, "--host", HOST, *memory, *limits, *name) as server:
        assert "every sweep reads 0 B" not in server.log
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    headers = {"Authorization": f"Bearer {KEY}".encode()}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


def gauge(http: Any, name: str) -> float:
    families = parser.text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples)


def quiet(http: Any) -> bool:
    """Whether nobody is served, and the model knows it."""
    names = (
        "layerstream_open_answers",
        "layerstream_requests_riding",
        "layerstream_requests_waiting",
    )
    return not any(gauge(http, name) for name in names)


def events(text: str) -> list[Any]:
    """What a stream of server-sent events says, "[DONE]" included."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# -- what is answered --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_greedy_text_of_the_unstreamed_model(
    prompt: str, client: Any, reference: Reference
) -> None:
    done = client.completions.create(prompt=prompt, max_tokens=24, **GREEDY)
    assert done.object == "text_completion"
    assert done.choices[0].text == reference.text(prompt, 24)
    assert done.choices[0].finish_reason == reference.finish_reason(prompt, 24)
    tokens = len(prompt.encode()), len(reference.ids(prompt, 24))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == tokens
    assert done.usage.total_tokens == sum(tokens)


def test_a_chat_is_the_greedy_text_behind_the_models_template(
    client: Any, reference: Reference
) -> None:
    done = client.chat.completions.create(messages=SAY, max_completion_tokens=24, **GREEDY)
    prompt = reference.chat(SAY)
    assert done.object == "chat.completion"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == reference.text(prompt, 24)
    assert done.usage.prompt_tokens == len(prompt)


def test_parts_of_a_message_and_the_developers_role_are_understood(
    client: Any, reference: Reference
) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, SAY[1]]
    done = client.chat.completions.create(messages=messages, max_tokens=9, **GREEDY)
    prompt = reference.chat([{"role": "system", "content": "Be\nbrief."}, SAY[1]])
    assert done.choices[0].message.content == reference.text(prompt, 9)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_completions_joined_are_the_whole_one(
    prompt: str, client: Any, reference: Reference
) -> None:
    chunks = list(client.completions.create(prompt=prompt, max_tokens=24, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reference.text(prompt, 24)
    ends = [None, reference.finish_reason(prompt, 24)]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == ends
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_usage(
    client: Any, reference: Reference
) -> None:
    *chunks, last = client.chat.completions.create(
        messages=SAY, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    prompt = reference.chat(SAY)
    assert "".join(pieces) == reference.text(prompt, 24)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 24)


def test_a_stream_comes_piece_by_piece_and_ends_with_done(http: Any) -> None:
    body = {"prompt": "Hello", "max_tokens": 4, "stream": True, **GREEDY}
    answer = http.post(COMPLETIONS, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *said, done = events(answer.text)
    assert done == "data: [DONE]"
    assert len(said) > 3
    assert all("usage" not in each for each in said)


def test_prompts_are_a_text_several_texts_token_ids_or_lists_of_them(
    client: Any, reference: Reference
) -> None:
    ids = [list(prompt.encode()) for prompt in PROMPTS[:2]]
    for prompt in (PROMPTS[:2], ids, ids[0]):
        done = client.completions.create(prompt=prompt, max_tokens=9, **GREEDY)
        expected = [reference.text(each, 9) for each in PROMPTS[: len(done.choices)]]
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == list(range(len(expected)))
        assert done.usage.completion_tokens == 9 * len(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_seen(
    stream: bool, client: Any, reference: Reference
) -> None:
    text = reference.text("Hello", 24)
    stop = text[5:9]
    assert text.find(stop) == 5
    asked = {"prompt": "Hello", "max_tokens": 24, "stop": ["never", stop], "stream": stream}
    done = client.completions.create(**asked, **GREEDY)
    chunks = list(done) if stream else [done]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[:5]
    assert chunks[-1].choices[0].finish_reason == "stop"
    # What only begins like a stop string is text.
    asked["stop"] = text[-3:] + "never"
    done = client.completions.create(**asked, **GREEDY)
    chunks = list(done) if stream else [done]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_drawn_tokens_are_those_of_transformers_with_the_same_seed(
    client: Any, reference: Reference
) -> None:
    def expected(seed: int) -> list[int]:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 1.9, "top_p": 0.95, "top_k": 0}
        return reference.ids("Hello", 24, **how)

    end = reference.tokenizer.eos_token_id
    ending = next(seed for seed in range(1000) if expected(seed)[-1] == end)
    for seed in (0, ending):
        done = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=24, temperature=1.9, top_p=0.95, seed=seed, n=2
        )
        for choice in done.choices:
            ids = expected(seed + choice.index)
            assert choice.text == reference.tokenizer.decode(ids, skip_special_tokens=True)
            assert choice.finish_reason == ("stop" if ids[-1] == end else "length")


def test_penalties_change_the_text_as_they_are_meant_to(client: Any, reference: Reference) -> None:
    plain = reference.ids("Hello", 24)
    done = client.completions.create(
        prompt="Hello", max_tokens=24, presence_penalty=2, frequency_penalty=2, **GREEDY
    )
    ids, seen = list(b"Hello"), [0] * 259
    for _ in range(24):
        with torch.no_grad():
            scores = reference.model(torch.tensor([ids])).logits[0, -1]
        counts = torch.tensor(seen)
        ids.append(int((scores - 2 * counts - 2 * (counts > 0)).argmax()))
        seen[ids[-1]] += 1
    assert ids[5:] != plain
    assert done.choices[0].text == reference.tokenizer.decode(ids[5:], skip_special_tokens=True)


def test_eight_at_once_each_get_their_own_text(server: Server, reference: Reference) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
        ) as client:

            async def ask(prompt: str) -> str:
                stream = await client.completions.create(
                    prompt=prompt, max_tokens=32, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*map(ask, PROMPTS))
        assert texts == [reference.text(prompt, 32) for prompt in PROMPTS]

    run(main(), seconds=60)


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


# -- what is refused ---------------------------------------------------------------------------------

ASK = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
TALK = {"model": "tiny", "messages": SAY, "max_tokens": 4}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]

BAD: dict[str, tuple[str, Any, int, str | None, str | None]] = {
    "not JSON": (COMPLETIONS, b'{"model": "tiny",', 400, None, "invalid_json"),
    "not UTF-8": (COMPLETIONS, b'{"model": "\xff"}', 400, None, "invalid_json"),
    "deep JSON": (CHAT, b"[" * 50_000, 400, None, "invalid_json"),
    "a list": (COMPLETIONS, [1], 400, None, "invalid_json"),
    "nothing": (COMPLETIONS, b"", 400, None, "invalid_json"),
    "half a character": (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None, "invalid_json"),
    "no model": (COMPLETIONS, {"prompt": "a"}, 400, "model", "missing_required_parameter"),
    "no prompt": (COMPLETIONS, {"model": "tiny"}, 400, "prompt", "missing_required_parameter"),
    "no messages": (CHAT, {"model": "tiny"}, 400, "messages", "missing_required_parameter"),
    "another model": (COMPLETIONS, {**ASK, "model": "b"}, 404, "model", "model_not_found"),
    "an unknown field": (COMPLETIONS, {**ASK, "foo": 1}, 400, "foo", "unknown_parameter"),
    "messages to complete": (
        COMPLETIONS,
        {**ASK, "messages": SAY},
        400,
        "messages",
        "unknown_parameter",
    ),
    "a number for a prompt": (COMPLETIONS, {**ASK, "prompt": 7}, 400, "prompt", "invalid_value"),
    "mixed prompts": (COMPLETIONS, {**ASK, "prompt": ["a", 1]}, 400, "prompt", "invalid_value"),
    "an empty prompt": (COMPLETIONS, {**ASK, "prompt": ""}, 400, "prompt", None),
    "no prompts": (COMPLETIONS, {**ASK, "prompt": []}, 400, "prompt", None),
    "one empty prompt": (COMPLETIONS, {**ASK, "prompt": [[], [1]]}, 400, "prompt", None),
    "an unknown token": (COMPLETIONS, {**ASK, "prompt": [1, 259]}, 400, "prompt", None),
    "a negative token": (COMPLETIONS, {**ASK, "prompt": [-1]}, 400, "prompt", None),
    "a huge token": (COMPLETIONS, {**ASK, "prompt": [10**30]}, 400, "prompt", None),
    "true for a token": (COMPLETIONS, {**ASK, "prompt": [True]}, 400, "prompt", "invalid_value"),
    "a prompt too long": (
        COMPLETIONS,
        {**ASK, "prompt": "a" * (CONTEXT_TOKENS + 1)},
        400,
        "prompt",
        "context_length_exceeded",
    ),
    "a chat too long": (
        CHAT,
        {**TALK, "messages": [{"role": "user", "content": "a" * CONTEXT_TOKENS}]},
        400,
        "messages",
        "context_length_exceeded",
    ),
    "no tokens": (COMPLETIONS, {**ASK, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    "negative tokens": (CHAT, {**TALK, "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    "huge tokens": (
        COMPLETIONS,
        {**ASK, "max_tokens": 10**9},
        400,
        "prompt",
        "context_length_exceeded",
    ),
    "tokens in words": (CHAT, {**TALK, "max_tokens": "4"}, 400, "max_tokens", "invalid_value"),
    "half a token": (CHAT, {**TALK, "max_tokens": 4.5}, 400, "max_tokens", "invalid_value"),
    "two limits": (
        CHAT,
        {**TALK, "max_completion_tokens": 5},
        400,
        "max_completion_tokens",
        "invalid_value",
    ),
    "too hot": (CHAT, {**TALK, "temperature": 2.1}, 400, "temperature", "invalid_value"),
    "an empty chat": (CHAT, {**TALK, "messages": []}, 400, "messages", "invalid_value"),
    "NaN": (
        COMPLETIONS,
        b'{"model": "tiny", "prompt": "a", "top_p": NaN}',
        400,
        "top_p",
        "invalid_value",
    ),
    "a long seed": (CHAT, {**TALK, "seed": 1 << 63}, 400, "seed", "invalid_value"),
    "an empty stop": (CHAT, {**TALK, "stop": [""]}, 400, "stop", "invalid_value"),
    "five stops": (CHAT, {**TALK, "stop": list("abcde")}, 400, "stop", "invalid_value"),
    "no choices": (CHAT, {**TALK, "n": 0}, 400, "n", "invalid_value"),
    "many choices": (CHAT, {**TALK, "n": 9}, 400, "n", "invalid_value"),
    "more answers than there are places": (
        COMPLETIONS,
        {**ASK, "prompt": ["a"] * 13},
        400,
        None,
        None,
    ),
    "log probabilities": (
        CHAT,
        {**TALK, "logprobs": True},
        400,
        "logprobs",
        "unsupported_parameter",
    ),
    "log probabilities of none": (
        COMPLETIONS,
        {**ASK, "logprobs": 0},
        400,
        "logprobs",
        "unsupported_parameter",
    ),
    "echo": (COMPLETIONS, {**ASK, "echo": True}, 400, "echo", "unsupported_parameter"),
    "suffix": (COMPLETIONS, {**ASK, "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    "best of": (COMPLETIONS, {**ASK, "best_of": 2}, 400, "best_of", "unsupported_parameter"),
    "tools": (CHAT, {**TALK, "tools": [{}]}, 400, "tools", "unsupported_parameter"),
    "JSON mode": (
        CHAT,
        {**TALK, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "unsupported_parameter",
    ),
    "options of no stream": (CHAT, {**TALK, "stream_options": {}}, 400, "stream_options", None),
    "an unknown option": (
        CHAT,
        {**TALK, "stream": True, "stream_options": {"foo": 1}},
        400,
        "stream_options.foo",
        "unknown_parameter",
    ),
    "an image": (
        CHAT,
        {**TALK, "messages": IMAGE},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    "an unknown role": (
        CHAT,
        {**TALK, "messages": [{"role": "tool", "content": "a"}]},
        400,
        "messages[0].role",
        "invalid_value",
    ),
    "no content": (
        CHAT,
        {**TALK, "messages": [{"role": "user"}]},
        400,
        "messages[0]",
        "invalid_value",
    ),
    "what the template refuses": (CHAT, {**TALK, "messages": SAY[::-1]}, 400, "messages", None),
    "a stream of nothing": (
        COMPLETIONS,
        {**ASK, "stream": True, "prompt": ""},
        400,
        "prompt",
        None,
    ),
    "an unknown path": ("/v1/embeddings", ASK, 404, None, "unknown_url"),
    "a path that is only read": ("/v1/models", ASK, 405, None, "method_not_supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_openais_error_and_the_service_goes_on(case: str, http: Any) -> None:
    path, body, status, param, code = BAD[case]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert len(error["message"]) > 10
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


def test_what_asks_for_nothing_special_is_taken(http: Any) -> None:
    harmless = {"echo": False, "best_of": 1, "logprobs": None, "user": "somebody", "stop": None}
    assert http.post(COMPLETIONS, json=ASK | harmless).status_code == 200
    harmless = {"tools": [], "logprobs": False, "response_format": {"type": "text"}, "seed": -1}
    assert http.post(CHAT, json=TALK | harmless).status_code == 200


def test_an_answer_is_taken_back_as_the_client_gave_it_out(client: Any) -> None:
    messages: list[Any] = list(SAY)
    options = GREEDY | {"max_tokens": 4}
    first = client.chat.completions.create(messages=messages, **options).choices[0].message
    messages += [first, {"role": "user", "content": "Go on"}]
    assert client.chat.completions.create(messages=messages, **options).choices[0].message.content


@pytest.mark.parametrize("temperature", [1e-38, 5e-324])
def test_next_to_no_temperature_is_none(
    temperature: float, client: Any, reference: Reference
) -> None:
    options = GREEDY | {"temperature": temperature}
    done = client.completions.create(prompt="Hello", max_tokens=8, **options)
    assert done.choices[0].text == reference.text("Hello", 8)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CompletionRequest, "prompt", [{}] * 1000),
        (ChatRequest, "messages", [0] * 1000),
        (ChatRequest, "messages", [{"role": "user", "content": [0] * 1000}]),
    ],
)
def test_of_a_long_list_of_wrong_items_only_the_first_is_looked_at(
    kind: type[BaseModel], name: str, value: list[Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", name: value})
    assert caught.value.error_count() < 10


def test_a_client_that_leaves_before_all_is_said_is_no_error_of_the_server(
    http: Any, server: Server
) -> None:
    left(server, ASK, missing=1).close()
    assert http.post(COMPLETIONS, json=ASK).status_code == 200
    assert "Traceback" not in server.log  # nor later: see ``serving``


@pytest.mark.parametrize("key", [None, "x", "wrong", KEY + "x", "a-k\u00e9y"])
def test_a_wrong_key_opens_nothing_but_health_and_metrics(key: str | None, server: Server) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for answer in (http.get("/v1/models"), http.post(COMPLETIONS, json=ASK)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").json() == {"status": "ok"}
        assert "layerstream_open_answers" in http.get("/metrics").text


@pytest.mark.parametrize("times", [1, 20], ids=["just too long", "far too long"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(chunked: bool, times: int, http: Any) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(times):
            yield b"x" * (MAX_BODY + 1)

    content = pieces() if chunked else b"".join(pieces())
    try:
        answer = http.post(COMPLETIONS, content=content)
    except httpx.TransportError:
        assert times > 8  # the server does not read for ever, and who writes on may miss the answer
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


# -- who comes and goes ------------------------------------------------------------------------------

LONG = {"model": "tiny", "prompt": "Hello", "max_tokens": LONG_TOKENS, "temperature": 0}


def left(server: Server, body: dict[str, Any], *, missing: int = 0) -> socket.socket:
    """A connection on which ``body`` was sent to be completed, but for its last bytes. Nobody reads from it."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    length = len(content) + missing
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + content)
    return connection


def test_more_than_there_are_places_for_are_told_to_come_back(
    http: Any, client: Any, server: Server
) -> None:
    with ExitStack() as stack:
        for count in (8, 4):  # answers to one request take as many places
            stack.enter_context(left(server, LONG | {"n": count}))
        until(lambda: gauge(http, "layerstream_open_answers") == 12)
        answer = http.post(COMPLETIONS, json=ASK)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**ASK)
    until(lambda: quiet(http))
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_served_no_longer(stream: bool, http: Any, server: Server) -> None:
    until(lambda: quiet(http))
    before = gauge(http, "layerstream_requests_cancelled_total")
    with left(server, LONG | {"stream": stream}) as connection:
        until(lambda: gauge(http, "layerstream_requests_riding") == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    until(lambda: quiet(http))
    assert gauge(http, "layerstream_requests_cancelled_total") == before + 1
    assert http.post(COMPLETIONS, json=ASK).status_code == 200


def test_a_client_that_does_not_read_holds_nobody_up(
    server: Server, http: Any, client: Any, reference: Reference
) -> None:
    with left(server, LONG | {"stream": True}):
        done = client.completions.create(prompt="Hello", max_tokens=24, **GREEDY)
        assert done.choices[0].text == reference.text("Hello", 24)
    until(lambda: quiet(http))


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return save_speaking_model(tmp_path_factory.mktemp("serve") / "mute", template=False)


def test_a_signal_lets_streams_end_with_an_error_and_the_server_with_0(mute: Path) -> None:
    options = ("--shutdown-seconds", "0", "--no-access-log", "--new-tokens", "2000")
    with (
        serving(mute, *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        error = http.post(CHAT, json=TALK | {"model": "mute"}).json()["error"]
        assert "chat template" in error["message"]
        asked = LONG | {"model": "mute", "stream": True, "max_tokens": 2000}
        with http.stream("POST", COMPLETIONS, json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            said = [line for line in lines if line]
        assert json.loads(said[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.wait() == 0
        assert "POST" not in server.log


def test_streaming_that_fails_for_good_is_told_to_clients_and_to_whoever_watches(
    mute: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    options = ("--chat-template", str(template), "--host", HOST, "--reader", "direct", *MEMORY)
    with (
        serving(mute, *options, "--new-tokens", "8") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        answer = http.post(CHAT, json={"model": "mute", "messages": SAY, "temperature": 0})
        assert answer.json()["usage"]["completion_tokens"] == 8  # the server's own limit
        ask = ASK | {"model": "mute"}
        with (mute / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        until(lambda: http.post(COMPLETIONS, json=ask).status_code != 200)
        answer = http.post(COMPLETIONS, json=ask | {"stream": True})
        assert answer.status_code in {500, 503}
        assert answer.json()["error"]["type"] == "server_error"
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")


REFUSED = {
    "a missing folder": ("nowhere", (), "nowhere"),
    "no tokenizer": ("mute", (), "no tokenizer"),
    "an address that is not ours": ("model", ("--bind", "192.0.2.1"), "Cannot listen on 192.0.2.1"),
    "an empty key": ("model", ("--api-key", ""), "API key is empty"),
    "a key with blanks": ("model", ("--api-key", "a b"), "API key"),
    "no such template": ("model", ("--chat-template", "nowhere"), "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_told_in_one_line(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, says = REFUSED[case]
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert main(["serve", str(tmp_path / name), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("layerstream: error: ")
    assert says in error
    assert error.count("\n") == 1
