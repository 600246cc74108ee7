"""`layerstream serve`: OpenAI's parameters, which are supported, without effect, or refused by name."""

from typing import Any

import pytest
from support.service import CHAT, CHAT_BODY, COMPLETIONS, GREEDY, MESSAGES, TEXT_BODY, Reference

pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from pydantic import BaseModel, ValidationError

from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
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
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (2, True),
    "functions": ([{}],),
    "modalities": (["text", "audio"],),
    "prompt_cache_retention": ("24h",),
    "reasoning_effort": ("high",),
    "response_format": ({"type": "json_schema"}, {"type": "text", "strict": True}),
    "service_tier": ("flex", "priority"),
    "store": (True, 0),
    "verbosity": ("high",),
}


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, TEXT_BODY), (CHAT, CHAT_BODY)])
def test_unsupported_parameters_are_accepted_with_values_that_have_no_effect(
    path: str, body: dict[str, Any], http: Any
) -> None:
    for index in range(max(map(len, WITHOUT_EFFECT.values()))):
        parameters = {name: values[index % len(values)] for name, values in WITHOUT_EFFECT.items()}
        answer = http.post(path, json=body | parameters)
        assert answer.status_code == 200, answer.text
    options = {"include_usage": None, "include_obfuscation": False}
    answer = http.post(path, json=body | {"stream": True, "stream_options": options})
    assert "[DONE]" in answer.text


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_parameters_are_refused_by_name_with_other_values(name: str, http: Any) -> None:
    for value in UNSUPPORTED[name]:
        answer = http.post(CHAT, json=CHAT_BODY | {name: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["code"] == "unsupported_parameter"


def test_of_several_unsupported_parameters_the_first_is_named(http: Any) -> None:
    wrong = {name: values[0] for name, values in UNSUPPORTED.items()}
    for names in (list(wrong), list(wrong)[::-1]):
        answer = http.post(CHAT, json=CHAT_BODY | {name: wrong[name] for name in names})
        assert answer.json()["error"]["param"] == names[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)}), ("user", 7)],
)
def test_tags_must_be_strings(name: str, value: Any, http: Any) -> None:
    error = http.post(CHAT, json=CHAT_BODY | {name: value}).json()["error"]
    assert (error["code"], error["param"].split(".")[0]) == ("invalid_value", name)


def test_messages_with_empty_tool_calls_are_accepted(http: Any) -> None:
    answer = {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [],
        "annotations": [],
        "audio": None,
    }
    messages = [*MESSAGES, answer, MESSAGES[1]]
    assert http.post(CHAT, json=CHAT_BODY | {"messages": messages}).status_code == 200
    answer["tool_calls"] = [{"id": "a"}]
    error = http.post(CHAT, json=CHAT_BODY | {"messages": messages}).json()["error"]
    assert error["param"].startswith("messages[2].tool_calls[0]")
    assert error["code"] == "invalid_value"


def test_an_answer_is_accepted_back_as_the_client_returned_it(client: Any) -> None:
    messages: list[Any] = list(MESSAGES)
    options = GREEDY | {"max_tokens": 4}
    first = client.chat.completions.create(messages=messages, **options).choices[0].message
    messages += [first, {"role": "user", "content": "Go on"}]
    assert client.chat.completions.create(messages=messages, **options).choices[0].message.content


@pytest.mark.parametrize("temperature", [1e-38, 5e-324])
def test_a_tiny_temperature_is_greedy(
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
def test_only_the_first_wrong_item_of_a_long_list_is_checked(
    kind: type[BaseModel], name: str, value: list[Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", name: value})
    assert caught.value.error_count() < 10
