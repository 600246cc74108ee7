"""`layerstream serve`: requests that it refuses, with OpenAI's errors."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.server import CONTEXT_TOKENS, Server
from support.service import (
    CHAT,
    CHAT_BODY,
    COMPLETIONS,
    KEY,
    MAX_BODY,
    MESSAGES,
    TEXT_BODY,
    send_request,
)

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

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
    "another model": (COMPLETIONS, {**TEXT_BODY, "model": "b"}, 404, "model", "model_not_found"),
    "a number for a prompt": (
        COMPLETIONS,
        {**TEXT_BODY, "prompt": 7},
        400,
        "prompt",
        "invalid_value",
    ),
    "mixed prompts": (
        COMPLETIONS,
        {**TEXT_BODY, "prompt": ["a", 1]},
        400,
        "prompt",
        "invalid_value",
    ),
    "an empty prompt": (COMPLETIONS, {**TEXT_BODY, "prompt": ""}, 400, "prompt", None),
    "no prompts": (COMPLETIONS, {**TEXT_BODY, "prompt": []}, 400, "prompt", None),
    "one empty prompt": (COMPLETIONS, {**TEXT_BODY, "prompt": [[], [1]]}, 400, "prompt", None),
    "an unknown token": (COMPLETIONS, {**TEXT_BODY, "prompt": [1, 259]}, 400, "prompt", None),
    "a negative token": (COMPLETIONS, {**TEXT_BODY, "prompt": [-1]}, 400, "prompt", None),
    "a huge token": (COMPLETIONS, {**TEXT_BODY, "prompt": [10**30]}, 400, "prompt", None),
    "true for a token": (
        COMPLETIONS,
        {**TEXT_BODY, "prompt": [True]},
        400,
        "prompt",
        "invalid_value",
    ),
    "a prompt too long": (
        COMPLETIONS,
        {**TEXT_BODY, "prompt": "a" * (CONTEXT_TOKENS + 1)},
        400,
        "prompt",
        "context_length_exceeded",
    ),
    "a chat too long": (
        CHAT,
        {**CHAT_BODY, "messages": [{"role": "user", "content": "a" * CONTEXT_TOKENS}]},
        400,
        "messages",
        "context_length_exceeded",
    ),
    "negative tokens": (CHAT, {**CHAT_BODY, "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    "huge tokens": (
        COMPLETIONS,
        {**TEXT_BODY, "max_tokens": 10**9},
        400,
        "prompt",
        "context_length_exceeded",
    ),
    "tokens in words": (CHAT, {**CHAT_BODY, "max_tokens": "4"}, 400, "max_tokens", "invalid_value"),
    "half a token": (CHAT, {**CHAT_BODY, "max_tokens": 4.5}, 400, "max_tokens", "invalid_value"),
    "two limits": (
        CHAT,
        {**CHAT_BODY, "max_completion_tokens": 5},
        400,
        "max_completion_tokens",
        "invalid_value",
    ),
    "too hot": (CHAT, {**CHAT_BODY, "temperature": 2.1}, 400, "temperature", "invalid_value"),
    "messages to complete": (
        COMPLETIONS,
        {**TEXT_BODY, "messages": MESSAGES},
        400,
        "messages",
        "unsupported_parameter",
    ),
    "a prompt for a chat": (
        CHAT,
        {**CHAT_BODY, "prompt": "a"},
        400,
        "prompt",
        "unsupported_parameter",
    ),
    "no tokens of a chat": (
        CHAT,
        {**CHAT_BODY, "max_tokens": 0},
        400,
        "max_tokens",
        "invalid_value",
    ),
    "many stops": (CHAT, {**CHAT_BODY, "stop": ["a"] * 65}, 400, "stop", "invalid_value"),
    "a bias for a word": (
        CHAT,
        {**CHAT_BODY, "logit_bias": {"a": 1}},
        400,
        "logit_bias.a",
        "invalid_value",
    ),
    "a bias too large": (
        CHAT,
        {**CHAT_BODY, "logit_bias": {"1": 101}},
        400,
        "logit_bias.1",
        "invalid_value",
    ),
    "a bias for an unknown token": (
        CHAT,
        {**CHAT_BODY, "logit_bias": {"259": 1}},
        400,
        "logit_bias",
        None,
    ),
    "likely tokens without log probabilities": (
        CHAT,
        {**CHAT_BODY, "top_logprobs": 2},
        400,
        "top_logprobs",
        None,
    ),
    "too many likely tokens": (
        COMPLETIONS,
        {**TEXT_BODY, "logprobs": 21},
        400,
        "logprobs",
        "invalid_value",
    ),
    "a template's own argument": (
        CHAT,
        {**CHAT_BODY, "chat_template_kwargs": {"tokenize": True}},
        400,
        "chat_template_kwargs.tokenize",
        None,
    ),
    "echo of a chat": (CHAT, {**CHAT_BODY, "echo": True}, 400, "echo", "unsupported_parameter"),
    "guided output": (
        CHAT,
        {**CHAT_BODY, "guided_json": {}},
        400,
        "guided_json",
        "unsupported_parameter",
    ),
    "an unknown role": (
        CHAT,
        {**CHAT_BODY, "messages": [{"role": "judge", "content": "a"}]},
        400,
        "messages[0].role",
        "invalid_value",
    ),
    "no content": (
        CHAT,
        {**CHAT_BODY, "messages": [{"role": "user"}]},
        400,
        "messages[0]",
        "invalid_value",
    ),
    "an empty chat": (CHAT, {**CHAT_BODY, "messages": []}, 400, "messages", "invalid_value"),
    "NaN": (
        COMPLETIONS,
        b'{"model": "tiny", "prompt": "a", "top_p": NaN}',
        400,
        "top_p",
        "invalid_value",
    ),
    "a long seed": (CHAT, {**CHAT_BODY, "seed": 1 << 63}, 400, "seed", "invalid_value"),
    "an empty stop": (CHAT, {**CHAT_BODY, "stop": [""]}, 400, "stop", "invalid_value"),
    "no choices": (CHAT, {**CHAT_BODY, "n": 0}, 400, "n", "invalid_value"),
    "many choices": (CHAT, {**CHAT_BODY, "n": 9}, 400, "n", "invalid_value"),
    "more answers than there are places": (
        COMPLETIONS,
        {**TEXT_BODY, "prompt": ["a"] * 13},
        400,
        None,
        None,
    ),
    "suffix": (COMPLETIONS, {**TEXT_BODY, "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    "best of": (COMPLETIONS, {**TEXT_BODY, "best_of": 2}, 400, "best_of", "unsupported_parameter"),
    "a tool that is none": (CHAT, {**CHAT_BODY, "tools": [{}]}, 400, "tools[0]", "invalid_value"),
    "tools that the template does not know": (
        CHAT,
        {**CHAT_BODY, "tools": [{"type": "function", "function": {"name": "look"}}]},
        400,
        "tools",
        "unsupported_parameter",
    ),
    "JSON mode": (
        CHAT,
        {**CHAT_BODY, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "unsupported_parameter",
    ),
    "options of no stream": (
        CHAT,
        {**CHAT_BODY, "stream_options": {}},
        400,
        "stream_options",
        None,
    ),
    "an image": (
        CHAT,
        {**CHAT_BODY, "messages": IMAGE},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    "what the template refuses": (
        CHAT,
        {**CHAT_BODY, "messages": MESSAGES[::-1]},
        400,
        "messages",
        None,
    ),
    "a stream of nothing": (
        COMPLETIONS,
        {**TEXT_BODY, "stream": True, "prompt": ""},
        400,
        "prompt",
        None,
    ),
    "an unknown path": ("/v1/images", TEXT_BODY, 404, None, "unknown_url"),
    "a path that is only read": ("/v1/models", TEXT_BODY, 405, None, "method_not_supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_openais_error_and_the_service_continues(case: str, http: Any) -> None:
    path, body, status, param, code = BAD[case]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert len(error["message"]) > 10
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200


def test_a_client_that_leaves_before_its_body_is_complete_causes_no_traceback(
    http: Any, server: Server
) -> None:
    send_request(server, TEXT_BODY, missing=1).close()
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200
    assert "Traceback" not in server.log  # nor later: see ``running_server``


@pytest.mark.parametrize("key", [None, "x", "wrong", KEY + "x", "a-k\u00e9y"])
def test_a_wrong_key_gives_access_to_health_and_metrics_only(
    key: str | None, server: Server
) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for answer in (http.get("/v1/models"), http.post(COMPLETIONS, json=TEXT_BODY)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").json() == {"status": "ok"}
        assert "layerstream_open_answers" in http.get("/metrics").text


@pytest.mark.parametrize("close", [False, True], ids=["", "closing"])
@pytest.mark.parametrize("times", [1, 100], ids=["just too long", "far too long"])
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
def test_a_client_that_sends_too_long_a_body_receives_the_refusal(
    chunked: bool, times: int, close: bool, http: Any
) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(times):
            yield b"x" * (MAX_BODY + 1)

    content = pieces() if chunked else b"".join(pieces())
    headers = {"Content-Type": "application/json"} | ({"Connection": "close"} if close else {})
    answer = http.post(COMPLETIONS, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200
