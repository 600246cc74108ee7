"""`layerstream serve`: what it refuses, and that it does so with OpenAI's errors and goes on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.server import CONTEXT_TOKENS, Server
from support.service import (
    ASK,
    CHAT,
    COMPLETIONS,
    GREEDY,
    KEY,
    MAX_BODY,
    SAY,
    TALK,
    Reference,
    left,
)

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from pydantic import BaseModel, ValidationError  # noqa: E402 - it comes with fastapi

from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402

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


HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "metadata": (None, {}, {"of": "ours"}),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True),
    "prompt_cache_key": (None, "a"),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None, "a"),
    "seed": (None, -1),
    "service_tier": (None, "auto", "default"),
    "stop": (None, []),
    "store": (None, False),
    "stream": (None, False),
    "stream_options": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "user": (None, "somebody"),
    "verbosity": (None, "medium"),
}
ASKING: dict[str, tuple[Any, ...]] = {
    "best_of": (2, True),
    "functions": ([{}],),
    "logit_bias": ({"50256": -100},),
    "modalities": (["text", "audio"],),
    "parallel_tool_calls": ("no",),
    "prompt_cache_retention": ("24h",),
    "reasoning_effort": ("high",),
    "response_format": ({"type": "json_schema"}, {"type": "text", "strict": True}),
    "service_tier": ("flex", "priority"),
    "store": (True, 0),
    "tool_choice": ("required", {"type": "function"}),
    "top_logprobs": (5, False),
    "verbosity": ("high",),
}


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, ASK), (CHAT, TALK)])
def test_what_asks_for_nothing_that_is_not_done_is_taken(
    path: str, body: dict[str, Any], http: Any
) -> None:
    for turn in range(max(map(len, HARMLESS.values()))):
        asked = {name: values[turn % len(values)] for name, values in HARMLESS.items()}
        answer = http.post(path, json=body | asked)
        assert answer.status_code == 200, answer.text
    options = {"include_usage": None, "include_obfuscation": False}
    answer = http.post(path, json=body | {"stream": True, "stream_options": options})
    assert "[DONE]" in answer.text


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_something_that_is_not_done_is_refused_by_name(name: str, http: Any) -> None:
    for value in ASKING[name]:
        answer = http.post(CHAT, json=TALK | {name: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("name", "value"),
    [("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)}), ("user", 7)],
)
def test_tags_are_texts(name: str, value: Any, http: Any) -> None:
    error = http.post(CHAT, json=TALK | {name: value}).json()["error"]
    assert (error["code"], error["param"].split(".")[0]) == ("invalid_value", name)


def test_turns_with_no_calls_in_them_are_taken(http: Any) -> None:
    said = {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [],
        "annotations": [],
        "audio": None,
    }
    messages = [*SAY, said, SAY[1]]
    assert http.post(CHAT, json=TALK | {"messages": messages}).status_code == 200
    said["tool_calls"] = [{"id": "a"}]
    error = http.post(CHAT, json=TALK | {"messages": messages}).json()["error"]
    assert (error["param"], error["code"]) == ("messages[2].tool_calls", "unknown_parameter")


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


@pytest.mark.parametrize("close", [False, True], ids=["", "closing"])
@pytest.mark.parametrize("times", [1, 100], ids=["just too long", "far too long"])
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
def test_who_sends_a_body_that_is_too_long_gets_to_see_that_it_is_refused(
    chunked: bool, times: int, close: bool, http: Any
) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(times):
            yield b"x" * (MAX_BODY + 1)

    content = pieces() if chunked else b"".join(pieces())
    headers = {"Connection": "close"} if close else {}
    answer = http.post(COMPLETIONS, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert http.post(COMPLETIONS, json=ASK).status_code == 200
