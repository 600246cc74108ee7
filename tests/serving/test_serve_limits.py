"""`layerstream serve`: how long answers may be, and fields that it does not know."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import CONTEXT_TOKENS, Server, running_server, wait_until
from support.service import (
    CHAT,
    CHAT_BODY,
    COMPLETIONS,
    GREEDY,
    HOST,
    MESSAGES,
    TEXT_BODY,
    Reference,
    idle,
)

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    """A server with memory for less than the model's context."""
    options = ("--host", HOST, "--concurrent", "1", "--prompt-tokens", "32", "--new-tokens", "64")
    name = ("--served-model-name", "tiny", "--strict")
    with running_server(folder, *options, *name, "--reader", "direct") as server:
        yield server


def context_of(http: Any) -> int:
    model = http.get("/v1/models").json()["data"][0]
    assert model["context_length"] == model["max_model_len"]
    return int(model["context_length"])


def test_the_context_is_what_requests_are_refused_by(small: Server) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as http:
        context = context_of(http)
        assert 64 < context < CONTEXT_TOKENS
        for prompt_tokens in (5, context - 2):
            body = {"prompt": "a" * prompt_tokens, "stream": True, **GREEDY}
            fits = body | {"max_tokens": context - prompt_tokens}
            with http.stream("POST", COMPLETIONS, json=fits) as answer:
                assert answer.status_code == 200
            answer = http.post(COMPLETIONS, json=body | {"max_tokens": context - prompt_tokens + 1})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
            assert f"maximum context length is {context} tokens" in error["message"]
        wait_until(lambda: idle(http))


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(small: Server) -> None:
    with httpx.Client(base_url=small.url, timeout=120) as http:
        body = {"messages": MESSAGES, "ignore_eos": True, **GREEDY}
        answer = http.post(CHAT, json=body).json()
        assert answer["usage"]["total_tokens"] == context_of(http)
        assert answer["choices"][0]["finish_reason"] == "length"


def test_an_unknown_field_is_ignored_logged_once_and_named_in_a_header(
    http: Any, server: Server
) -> None:
    message = MESSAGES[1] | {"mood": "good", "odd\r\nname": 1}
    body = CHAT_BODY | {"messages": [message, message], "frobnicate": 1, "nothing": None}
    for stream in (False, True):
        answer = http.post(CHAT, json=body | {"stream": stream})
        assert answer.status_code == 200
        assert answer.headers["x-ignored-fields"] == "frobnicate, messages.mood"
    assert server.log.count("'frobnicate'") == 1
    assert "x-ignored-fields" not in http.post(CHAT, json=CHAT_BODY).headers


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"foo": 1}, "foo"),
        ({"messages": [MESSAGES[1] | {"mood": "good"}]}, "messages[0].mood"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
    ],
)
def test_a_strict_service_refuses_unknown_fields(
    body: dict[str, Any], path: str, small: Server
) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as http:
        answer = http.post(CHAT, json=CHAT_BODY | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, path)
    assert error["code"] == "unknown_parameter"


def test_a_forced_token_is_the_answer(client: Any) -> None:
    done = client.completions.create(
        prompt="Hello", max_tokens=3, logit_bias={str(ord("Q")): 100}, **GREEDY
    )
    assert done.choices[0].text == "QQQ"


def test_sampling_with_the_likeliest_token_alone_is_greedy(
    client: Any, reference: Reference
) -> None:
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        done = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=12, temperature=2, extra_body=extra
        )
        assert done.choices[0].text == reference.text("Hello", 12)


def test_the_repetition_penalty_is_that_of_transformers(client: Any, reference: Reference) -> None:
    done = client.completions.create(
        prompt="Hello", max_tokens=12, extra_body={"repetition_penalty": 1.7}, **GREEDY
    )
    text = reference.text("Hello", 12, repetition_penalty=1.7)
    assert done.choices[0].text == text != reference.text("Hello", 12)


def test_an_answer_ends_at_any_token_that_the_request_names_or_at_none(
    client: Any, reference: Reference
) -> None:
    ids = reference.ids("Hello", 24)
    first = ids[4]
    done = client.completions.create(
        prompt="Hello", max_tokens=24, extra_body={"stop_token_ids": [first]}, **GREEDY
    )
    assert done.usage.completion_tokens == ids.index(first) + 1
    assert done.choices[0].finish_reason == "stop"
    end = {str(reference.tokenizer.eos_token_id): 100}
    for extra, tokens in (({}, 1), ({"min_tokens": 5}, 6), ({"ignore_eos": True}, 8)):
        done = client.completions.create(
            prompt="Hello", max_tokens=8, logit_bias=end, extra_body=extra, **GREEDY
        )
        assert done.usage.completion_tokens == tokens


def test_what_clients_send_back_of_an_answer_is_taken(http: Any) -> None:
    called = {"name": "look", "arguments": '{"at": "this"}'}
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "id": "msg_1",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": called, "index": 0}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
    ]
    answer = http.post(CHAT, json=CHAT_BODY | {"messages": messages, "stop": list("0123456789")})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers


def test_an_answer_that_will_not_end_well_is_refused_before_it_begins(small: Server) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as http:
        for stream in (False, True):
            body = TEXT_BODY | {"max_tokens": 10**6, "stream": stream}
            answer = http.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"


JSON = {"Content-Type": "application/json"}
