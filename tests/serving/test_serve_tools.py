"""`layerstream serve`: reasoning and calls of tools, through the chat template and the response template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.server import Server, running_server
from support.tool_model import CALL, REASONING, TEXT, response_template_file, save_tool_model

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")
pytest.importorskip("transformers.utils.chat_parsing", reason="needs a newer transformers")

PROPERTIES = {"at": {"type": "string"}, "times": {"type": "integer"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": PROPERTIES},
        },
    }
]
ASKED = [{"role": "user", "content": "What is there?"}]
OPTIONS: dict[str, Any] = {"model": "model", "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("tools") / "model")


@pytest.fixture(scope="module")
def tools_client(model: Path) -> Iterator[Any]:
    with (
        running_server(model) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


def test_reasoning_text_and_calls_come_in_their_places(tools_client: Any) -> None:
    done = tools_client.chat.completions.create(messages=ASKED, tools=TOOLS, **OPTIONS)
    message = done.choices[0].message
    assert message.content == TEXT
    assert message.reasoning_content == REASONING
    (call,) = message.tool_calls
    assert (call.type, call.function.name) == ("function", CALL["name"])
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert done.choices[0].finish_reason == "tool_calls"


def test_a_stream_has_the_same_in_deltas(tools_client: Any) -> None:
    options = {**OPTIONS, "stream_options": {"include_usage": True}}
    chunks = list(
        tools_client.chat.completions.create(messages=ASKED, tools=TOOLS, stream=True, **options)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(reasoning) == REASONING
    assert len([each for each in reasoning if each]) > 1
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, CALL["name"])
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage.completion_tokens == 12


def test_what_a_tool_answers_goes_into_the_chat_template(tools_client: Any, model: Path) -> None:
    done = tools_client.chat.completions.create(messages=ASKED, tools=TOOLS, **OPTIONS)
    message = done.choices[0].message
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Water."}
    messages = [*ASKED, message, answer]
    again = tools_client.chat.completions.create(messages=messages, tools=TOOLS, **OPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sent = message.to_dict()
    sent["tool_calls"][0]["function"]["arguments"] = CALL["arguments"]
    text = tokenizer.apply_chat_template(
        [*ASKED, sent, answer], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert "the sea" in text
    assert "Water." in text
    assert REASONING in text
    assert again.usage.prompt_tokens == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_model_that_may_use_no_tools_is_told_of_none(tools_client: Any) -> None:
    counts = [
        tools_client.chat.completions.create(messages=ASKED, **options, **OPTIONS).usage
        for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert counts[0].prompt_tokens == counts[1].prompt_tokens < counts[2].prompt_tokens


def test_an_answer_cut_in_a_call_has_no_call(tools_client: Any) -> None:
    options = {**OPTIONS, "max_tokens": 9}
    done = tools_client.chat.completions.create(messages=ASKED, tools=TOOLS, **options)
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].message.tool_calls is None
    assert done.choices[0].message.content.startswith(TEXT)


def test_a_stop_string_ends_an_answer_before_its_call(tools_client: Any) -> None:
    done = tools_client.chat.completions.create(
        messages=ASKED, tools=TOOLS, stop="<tool_call>", **OPTIONS
    )
    assert done.choices[0].message.content == TEXT
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == 7


def post(server: Server, **body: Any) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        return http.post("/v1/chat/completions", json={"messages": ASKED, **OPTIONS, **body})


def test_without_a_response_template_tools_are_refused_unless_one_is_given(tmp_path: Path) -> None:
    model = save_tool_model(tmp_path / "model", response_template=False)
    with running_server(model) as server:
        answer = post(server, tools=TOOLS)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "--response-template" in answer.json()["error"]["message"]
    with running_server(
        model, "--response-template", str(response_template_file(tmp_path))
    ) as server:
        message = post(server, tools=TOOLS).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == CALL["name"]


def test_a_call_that_is_none_is_shown_as_text(tmp_path: Path) -> None:
    model = save_tool_model(tmp_path / "model", broken=True)
    with running_server(model) as server:
        choice = post(server, tools=TOOLS).json()["choices"][0]
        assert "tool_calls" not in choice["message"]
        assert "times}}" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
